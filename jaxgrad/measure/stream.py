"""The stream of measured batches: while one's results are written, the next ones are under way."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from jaxgrad.checkpoints import LoadedModel
from jaxgrad.data.batches import Batch, batch_arrays
from jaxgrad.data.tokens import TokenizedExample
from jaxgrad.measure.memory import batches_in_flight
from jaxgrad.measure.programs import Programs
from jaxgrad.measure.rows import example_results
from jaxgrad.results import ExampleResult


def measured(
    programs: Programs,
    model: LoadedModel,
    plan: Sequence[tuple[Sequence[TokenizedExample], Batch]],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[list[ExampleResult]]:
    """The results of each batch, in the order of the plan.

    Work that does not need the device (rows, Parquet, the next arrays) overlaps with it. On a CPU two
    batches are in flight (`batches_in_flight`).

    Args:
        programs: of the model.
        model: its weights.
        plan: the examples that a batch's members are positions in, and the batch.
        stop: asked between batches; once it says so, those in flight are the last.

    Raises:
        UserError: the memory is too small for one example.
    """

    def measure(tokenized: Sequence[TokenizedExample], batch: Batch) -> list[ExampleResult]:
        arrays = batch_arrays(batch, tokenized)
        loss_B, statistics = programs.measure(model.state, batch.shape, arrays)
        members = [tokenized[member] for member in batch.members]
        return example_results(members, loss_B, statistics, programs.selection, model.config)

    in_flight = batches_in_flight(programs.mesh_shape)
    pool = ThreadPoolExecutor(max_workers=in_flight, thread_name_prefix="measure")
    pending: deque[Future[list[ExampleResult]]] = deque()
    try:
        for tokenized, batch in plan:
            if stop():
                break
            pending.append(pool.submit(measure, tokenized, batch))
            # One more than run, so that a thread that is done finds its next batch.
            if len(pending) > in_flight:
                yield pending.popleft().result()
        while pending:
            future = pending.popleft()
            # They begin in order, so behind one that has not begun none is to be waited for.
            if stop() and future.cancel():
                return
            yield future.result()
    finally:
        # Ctrl-C does not wait for what is still in flight.
        pool.shutdown(wait=False, cancel_futures=True)
