"""Checkpoints of a Trainer that are complete or not there: its own, but written beside their place and renamed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer

from hopskip.errors import TrainingError
from hopskip.train.checkpoint import PARTIAL, last_checkpoint, replacing, rotate

_Base: Any = Trainer if TYPE_CHECKING else object


class WholeCheckpoints(_Base):  # type: ignore[misc]
    """A mixin over any Trainer. Weights that are not numbers are not saved.

    Raises:
        TrainingError: from `train`: a checkpoint cannot be written, or is not worth it.
    """

    _is_saving = False

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return str(Path(folder) / PARTIAL) if self._is_saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        weights = (parameter for parameter in model.parameters() if parameter.requires_grad)
        if not all(_is_finite(parameter) for parameter in weights):
            raise TrainingError(
                f"weights are not numbers after step {self.state.global_step}, so no checkpoint is written: lower the "
                f"learning rate, or set max_grad_norm; {self._way_back()}"
            )
        output = Path(self._get_output_dir(trial))
        folder = output / f"checkpoint-{self.state.global_step}"
        self._is_saving = True
        try:
            if self.args.should_save:
                with replacing(folder) as partial:
                    self.accelerator.wait_for_everyone()
                    super()._save_checkpoint(model, trial)
                    self._name_the_best(partial, folder)
                    self.accelerator.wait_for_everyone()
            else:
                self.accelerator.wait_for_everyone()  # not before the folder is empty
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
        finally:
            self._is_saving = False
        if self.args.should_save:
            rotate(output, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _name_the_best(self, partial: Path, folder: Path) -> None:
        """The best checkpoint by the place where it will lie, in the state that is saved too."""
        best = self.state.best_global_step
        place = folder.with_name(f"checkpoint-{best}")
        if best and (place == folder or place.exists()):
            self.state.best_model_checkpoint = str(place)
            self.state.save_to_json(str(partial / "trainer_state.json"))

    def _way_back(self) -> str:
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        return f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"


def _is_finite(parameter: Tensor) -> bool:
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # a shard, under FSDP
    return bool(local.isfinite().all())
