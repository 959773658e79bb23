openmp: bool

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def clip_loss_sums(
    logits: int,
    stride: int,
    rows: int,
    columns: int,
    shift: float,
    row_sums: int,
    column_sums: int,
) -> None: ...
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
