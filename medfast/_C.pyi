from collections.abc import Sequence

openmp: bool

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def multiplies_bf16() -> bool: ...
def product(
    count: int,
    rows: int,
    columns: int,
    depth: int,
    a: int,
    a_strides: Sequence[int],
    b: int,
    b_strides: Sequence[int],
    alpha: float,
    accumulate: bool,
    out: int,
    out_strides: Sequence[int],
    is_bf16: bool,
    rounds: bool,
) -> None: ...
def largest_norm(features: int, rows: int, width: int) -> float: ...
def clip_loss_sums(
    logits: int,
    stride: int,
    rows: int,
    columns: int,
    shift: float,
    row_sums: int,
    column_sums: int,
) -> None: ...
def clip_loss_sums_of_features(
    rows: int,
    columns: int,
    row_count: int,
    column_count: int,
    depth: int,
    scale: float,
    offset: int,
    shift: float,
    own: int,
    row_sums: int,
    column_sums: int,
    kept: int = 0,
    kept_stride: int = 0,
    step: float = 1.0,
    *,
    is_bf16: bool,
) -> None: ...
def clip_loss_gradient_of_features(
    kept: int,
    stride: int,
    step: float,
    rows: int,
    columns: int,
    depth: int,
    scale: float,
    offset: int,
    shift: float,
    row_weights: int,
    column_weights: int,
    own: int,
    features: int,
    of_columns: bool,
    gradient: int,
) -> float: ...
def clip_loss_gradient(
    logits: int,
    stride: int,
    rows: int,
    columns: int,
    shift: float,
    row_weights: int,
    column_weights: int,
    gradient: int,
    is_bf16: bool,
) -> float: ...
def siglip_loss_pass(
    logits: int,
    stride: int,
    rows: int,
    columns: int,
    bias: float,
    gradient: int,
    is_bf16: bool,
) -> tuple[float, float, float]: ...
def retrieval_rank_counts(
    scores: int,
    stride: int,
    rows: int,
    columns: int,
    row_thresholds: int,
    column_thresholds: int,
    row_counts: int,
    column_counts: int,
) -> None: ...
def local_alignment_attend(
    starts: int,
    captions: int,
    images: int,
    patches: int,
    similarity: int,
    patch_mask: int,
    temperature: float,
    attention: int,
    dots: int,
) -> None: ...
def local_alignment_scores(
    starts: int,
    captions: int,
    images: int,
    patches: int,
    attention: int,
    mixed: int,
    dots: int,
    norms: int,
    temperature: float,
    min_norm: float,
    scores: int,
) -> None: ...
def local_alignment_gradient(
    starts: int,
    captions: int,
    images: int,
    patches: int,
    similarity: int,
    patch_mask: int,
    mixed: int,
    norms: int,
    scores: int,
    d_scores: int,
    temp_attention: float,
    temp_words: float,
    min_norm: float,
    attention: int,
    d_similarity: int,
    weighted: int,
    d_norms: int,
) -> tuple[float, float]: ...

class LocalAlignmentBatch:
    def __init__(
        self,
        starts: int,
        captions: int,
        images: int,
        patches: int,
        depth: int,
        words: int,
        features: int,
        patch_mask: int,
        norms: int,
        temp_attention: float,
        temp_words: float,
        min_norm: float,
    ) -> None: ...
    def scores(self, scores: int) -> None: ...
    def gradients(
        self,
        scores: int,
        d_scores: int,
        accumulate: bool,
        d_similarity: int,
        d_words: int,
        d_patches: int,
        d_norms: int,
    ) -> tuple[float, float]: ...

def filip_loss_maxima(
    starts: int,
    captions: int,
    images: int,
    patches: int,
    similarity: int,
    shares: int,
    ids: int,
    all_captions: int,
    all_images: int,
    first_image: int,
    all_words: int,
    image_to_text: int,
    text_to_image: int,
    best_patch: int,
    best_word: int,
    index_bytes: int,
) -> None: ...
def filip_loss_gradient(
    starts: int,
    ids: int,
    captions: int,
    images: int,
    patches: int,
    all_words: int,
    width: int,
    word_features: int,
    patch_features: int,
    is_bf16: bool,
    shares: int,
    d_image_to_text: int,
    d_text_to_image: int,
    best_patch: int,
    best_word: int,
    index_bytes: int,
    d_words: int,
    d_patches: int,
) -> None: ...
def sparc_loss_align(
    similarity: int,
    mask: int,
    words: int,
    patches: int,
    least: float,
    constant: float,
    weights: int,
) -> None: ...
def sparc_loss_align_gradient(
    similarity: int,
    mask: int,
    words: int,
    patches: int,
    least: float,
    constant: float,
    gradient: int,
) -> None: ...
def sparc_loss_contrast(
    contexts: int,
    words: int,
    pairs: int,
    count: int,
    width: int,
    scale: float,
    weight: float,
    min_norm: float,
    products: int,
    through_contexts: int,
    through_words: int,
) -> tuple[float, float]: ...
def sparc_loss_add_rows(rows: int, factors: int, count: int, width: int, out: int) -> None: ...
