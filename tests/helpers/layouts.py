"""A layout with everything in it: two stacks, experts, a convolution."""

from hywu_core.layout import LoRALayout, Module, Stack

LAYOUT = LoRALayout(
    (
        Stack(
            ("blocks.0", "blocks.1"),
            (
                Module("qkv", 6, 18),
                Module("mlp.experts.w1", 6, 5, 3),
                Module("conv", 6, 4, conv=True),
            ),
        ),
        Stack(("last",), (Module("out", 6, 7),)),
    ),
    2,
    3.0,
)
