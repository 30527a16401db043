"""Linear maps of full or low rank, as gates and decays use them."""

from __future__ import annotations

from torch import Tensor, nn

from ..contract import tag_parameter

PROJECTION_STD = 0.02  # of freshly drawn weights, as in the models of the BASED paper


class LowRankLinear(nn.Module):
    """y = W_up W_down x + b.

    Args:
        in_features, out_features: widths.
        rank: width between the two maps.
        bias: whether there is a b.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        out: Tensor = self.up(self.down(x))
        return out


def make_projection(
    in_features: int, out_features: int, rank: int | None = None, *, bias: bool = False
) -> nn.Linear | LowRankLinear:
    """A linear map, in two factors where a rank is given; its bias takes no weight decay."""
    made = (
        nn.Linear(in_features, out_features, bias=bias)
        if rank is None
        else LowRankLinear(in_features, out_features, rank, bias=bias)
    )
    for linear in linears_of(made):
        if linear.bias is not None:
            tag_parameter(linear.bias, weight_decay=False)
    return made


def init_projections(*modules: nn.Module | None) -> None:
    """Weights N(0, 0.02) and zero biases of every linear map inside."""
    for linear in linears_of(*modules):
        nn.init.normal_(linear.weight, std=PROJECTION_STD)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def linears_of(*modules: nn.Module | None) -> list[nn.Linear]:
    """Every linear map in some modules."""
    inside = [item for module in modules if module is not None for item in module.modules()]
    return [item for item in inside if isinstance(item, nn.Linear)]


def projection_flops(*modules: nn.Module | None) -> int:
    """Matrix-product FLOPs of the linear maps inside, for one token."""
    return 2 * sum(linear.weight.numel() for linear in linears_of(*modules))
