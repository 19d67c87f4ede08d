"""Images and the windows that slide over them, as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def image_windows(draw, widest, sizes, channels):
    """Shape (B, H, W, C), kernel, stride, padding and dilation; each window meets the image.

    H < 10 and W <= widest; kernels up to `sizes`; strides beyond kernels and padding beyond the
    image occur.
    """
    sides = draw(st.tuples(st.integers(1, 9), st.integers(1, widest)))
    axis = st.tuples(
        st.integers(1, sizes),
        st.integers(1, 4),
        st.integers(0, 4),
        st.integers(0, 4),
        st.integers(1, 3),
    )
    axes = [draw(axis.filter(lambda a, n=n: n + a[2] + a[3] > (a[0] - 1) * a[4])) for n in sides]
    kernel, stride, before, after, dilation = zip(*axes, strict=True)
    shape = (draw(st.integers(1, 3)), *sides, draw(st.sampled_from(channels)))
    return shape, kernel, stride, ((before[0], after[0]), (before[1], after[1])), dilation
