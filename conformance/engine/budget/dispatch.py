"""The base of what watches or changes a run of torch, operation by operation."""

from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """A dispatch mode that is left alone by torch's compiler: torch imports it otherwise, 1.5 s, to have nothing compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False
