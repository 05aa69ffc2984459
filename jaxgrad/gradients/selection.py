"""Which weights are measured: the names of all, and the choice that --parameters makes of them."""

import dataclasses
import functools
import re

from jaxgrad.errors import UserError
from jaxgrad.models.config import DecoderConfig
from jaxgrad.models.decoder import projections_of
from jaxgrad.projections import ATTENTION, HEAD, MLP, PROJECTION_NAMES, MatrixAddress

# What a name of --parameters stands for.
GROUPS = {"attention": ATTENTION, "mlp": MLP, "all": PROJECTION_NAMES}


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which weights are measured.

    Attributes:
        addresses: of the matrices of an example: projection by projection in the decoder's order, each
            with its layers ascending.
    """

    addresses: tuple[MatrixAddress, ...]

    @functools.cached_property
    def _layers(self) -> dict[str, tuple[int, ...]]:
        layers: dict[str, tuple[int, ...]] = {}
        for address in self.addresses:
            # A weight outside the layers is the only one of its stack.
            layers[address.projection] = (
                *layers.get(address.projection, ()),
                address.layer or 0,
            )
        return layers

    @property
    def names(self) -> tuple[str, ...]:
        """The projections, in the decoder's order."""
        return tuple(self._layers)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        """The measured layers of a projection, ascending; (0,) for `lm_head`."""
        return self._layers[name]

    @property
    def num_matrices(self) -> int:
        """Matrices an example."""
        return len(self.addresses)


def one_of_each(names: tuple[str, ...]) -> Selection:
    """The first matrix of each of these projections: what one layer by itself has."""
    return Selection(tuple(MatrixAddress(None if name == HEAD else 0, name) for name in names))


def parameter_names(config: DecoderConfig) -> dict[str, MatrixAddress]:
    """Name of every measurable weight -> its address, in the decoder's order.

    The names are Llama's for every family, also where a checkpoint holds several fused in one weight.
    """
    blocks = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}
    present = projections_of(config)
    names = {
        f"model.layers.{layer}.{block}.{projection}_proj.weight": MatrixAddress(layer, projection)
        for projection, block in blocks.items()
        if projection in present
        for layer in range(config.num_layers)
    }
    if HEAD in present:
        names["lm_head.weight"] = MatrixAddress(None, HEAD)
    return names


def select_parameters(config: DecoderConfig, parameters: str) -> Selection:
    """Resolve --parameters: "attention", "mlp", "all", or a regular expression on the weights' names.

    Raises:
        UserError: the expression is broken, or matches nothing.
    """
    names = parameter_names(config)
    if parameters in GROUPS:
        chosen = [a for a in names.values() if a.projection in GROUPS[parameters]]
    else:
        try:
            pattern = re.compile(parameters)
        except re.error as error:
            raise UserError(
                f"--parameters {parameters!r} is not a regular expression: {error}"
            ) from error
        chosen = [address for name, address in names.items() if pattern.search(name)]
        if not chosen:
            first, last = next(iter(names)), list(names)[-1]
            raise UserError(
                f"--parameters {parameters!r} matches none of the {len(names)} weights "
                f"({first} ... {last}); give attention, mlp, all, or a regular expression on these names"
            )
    return Selection(tuple(chosen))
