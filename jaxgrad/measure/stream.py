"""Batches, measured one after the other: while one's results are written, the next ones are computed."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from jaxgrad.checkpoints import LoadedModel
from jaxgrad.data.batches import Batch, BatchShape, batch_arrays
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
    begin: Callable[[BatchShape], bool] = lambda shape: True,
) -> Iterator[list[ExampleResult]]:
    """The results of each batch, in the order of the plan.

    The host's work (rows, Parquet, the next arrays) overlaps with the device's. On a CPU two batches are
    computed at once (`batches_in_flight`).

    Args:
        programs: of the model.
        model: its weights.
        plan: for each batch its window's examples, which its members are positions in, and the batch.
        stop: asked between batches. Once it is true, the batches in flight are the last.
        begin: asked for each batch right before it is computed, in the thread that does so. Once it is
            false, that batch and all later ones are left out. For meshes, where batches are computed one
            by one.

    Raises:
        UserError: the memory is too small for one example.
    """

    def measure(tokenized: Sequence[TokenizedExample], batch: Batch) -> list[ExampleResult] | None:
        if not begin(batch.shape):
            return None
        arrays = batch_arrays(batch, tokenized)
        loss_B, columns = programs.measure(model.state, batch.shape, arrays)
        members = [tokenized[member] for member in batch.members]
        return example_results(members, loss_B, columns, programs.selection, model.config)

    in_flight = batches_in_flight(programs.mesh_shape)
    pool = ThreadPoolExecutor(max_workers=in_flight, thread_name_prefix="measure")
    pending: deque[Future[list[ExampleResult] | None]] = deque()
    try:
        for tokenized, batch in plan:
            if stop():
                break
            pending.append(pool.submit(measure, tokenized, batch))
            # One more than are computed, so that a free thread finds its next batch.
            if len(pending) > in_flight:
                if (results := pending.popleft().result()) is None:
                    return
                yield results
        while pending:
            future = pending.popleft()
            # Batches start in order: if this one was cancelled, no later one has started.
            if stop() and future.cancel():
                return
            if (results := future.result()) is None:
                return
            yield results
    finally:
        # Ctrl-C does not wait for what is still in flight.
        pool.shutdown(wait=False, cancel_futures=True)
