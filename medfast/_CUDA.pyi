class ClipLossFeatures:
    def __init__(
        self,
        rows: int,
        columns: int,
        dtype: int,
        scale: int,
        M: int,
        N: int,
        D: int,
        offset: int,
    ) -> None: ...

class ClipLossSpan:
    def __init__(
        self, row_start: int, row_stop: int, column_start: int, column_stop: int, parts: int
    ) -> None: ...

class ClipLossUpstream:
    def __init__(
        self, row_lse: int, column_lse: int, d_own: int, d_rows: int, d_columns: int
    ) -> None: ...

def clip_loss_blocks_at_a_time() -> int: ...
def clip_loss_sums(
    features: ClipLossFeatures,
    span: ClipLossSpan,
    row_partials: int,
    row_stride: int,
    column_partials: int,
    stream: int,
) -> None: ...
def clip_loss_ends(
    features: ClipLossFeatures,
    span: ClipLossSpan,
    row_partials: int,
    row_stride: int,
    column_partials: int,
    own: int,
    row_lse: int,
    column_lse: int,
    flags: int,
    stream: int,
) -> None: ...
def clip_loss_online(
    features: ClipLossFeatures, flags: int, row_lse: int, column_lse: int, stream: int
) -> None: ...
def clip_loss_range(
    features: ClipLossFeatures,
    upstream: ClipLossUpstream,
    boost: float,
    normalisers: int,
    stream: int,
) -> None: ...
def clip_loss_gradient(
    features: ClipLossFeatures,
    span: ClipLossSpan,
    upstream: ClipLossUpstream,
    normalisers: int,
    gradient: int,
    stride: int,
    sums: int,
    stream: int,
) -> None: ...
def rank_merge(
    sources: list[int], targets: list[int], length: int, is_log_sum_exp: bool, stream: int
) -> None: ...
def normalize_crops(
    images: int,
    offsets: int,
    count: int,
    height: int,
    width: int,
    crop_height: int,
    crop_width: int,
    factor: list[float],
    shift: list[float],
    out: int,
    dtype: int,
    stream: int,
) -> None: ...
