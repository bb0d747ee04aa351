"""One training step: run the phases that are due, average, update, follow the average.

Nothing in a step waits for the device: statistics stay there until the next tick, and what varies in time reaches it
as a device scalar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stylepipe.config import EMAConfig, OptimConfig, filled
from stylepipe.datasets.reader import Batch
from stylepipe.training import activity
from stylepipe.training.adam import Adam
from stylepipe.training.arena import Arena, mark_trained
from stylepipe.training.averaging import Averaging, Exchange
from stylepipe.training.distributed import share_
from stylepipe.training.ema import EMA, ema_decay
from stylepipe.training.growth import Stage
from stylepipe.training.phase import MicroBatch, Phase, Recipe, Record
from stylepipe.training.power_ema import SIGMA_RELS, PowerEMA

IN_A_ROW = "skipped_in_a_row"
"""Last part of the statistic of each phase that counts the updates skipped one after the other, up to now."""

# Of names in a state.
_SKIPPED = "skipped."
_POWER = "power_"
_POWER_START = "power_start"


@dataclass(frozen=True)
class Used:
    """What a stage uses of a network.

    Attributes:
        parameters: those in use.
        windows: where they lie in the network's arena.
        gradients: the arena's there.
        averaging: makes them those of all processes; None in a process alone.
    """

    parameters: list[nn.Parameter]
    windows: list[slice]
    gradients: list[Tensor]
    averaging: Averaging | None


class Engine:
    """Trains the networks of a recipe, one batch after another.

    Args:
        recipe: networks on their device, and what to do with them.
        optim: Adam's settings.
        ema: half-life of the averages, and whether power-function averages are kept as well.
        rank, world_size: which of how many processes this is.
        exchange: how they exchange gradients; by default in float32.

    Attributes:
        images_seen: the clock.
        whole: whether its state is that of the clock: within a step, from its first update on, it is not.
        skipped: [2] float32 for each phase by name: updates skipped for inf or NaN gradients, in all and in a row up
            to now. It stays on the device.
        power_averages: of each averaged network by name, those of SIGMA_RELS, for `stylepipe ema`.

    The stage says how many images, batch_gpu, a device works on at a time. Image i of a batch of B belongs to
    micro-batch i mod (B / batch_gpu), and micro-batch s to process s mod world_size. So the same images meet in
    minibatch stddev, whatever the number of processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        optim: OptimConfig,
        ema: EMAConfig,
        rank: int = 0,
        world_size: int = 1,
        exchange: Exchange | None = None,
    ) -> None:
        self.recipe = recipe
        self.rank, self.world_size, self._exchange = rank, world_size, exchange or Exchange()
        self.images_seen = 0
        self.whole = True
        self.arenas = {name: Arena(network) for name, network in recipe.networks.items()}
        self.averages = {name: EMA(network, self.arenas[name]) for name, network in recipe.averaged.items()}
        self.power_averages = {
            name: [PowerEMA(network, self.arenas[name], sigma_rel) for sigma_rel in SIGMA_RELS]
            for name, network in (recipe.averaged.items() if ema.posthoc_kimg else ())
        }
        self.optimizers = {name: self._optimizer(name, optim) for name in self.arenas}
        self.device = next(iter(self.arenas.values())).params.device
        self.record = Record(self.device)
        self.skipped = {phase.name: torch.zeros(2, device=self.device) for phase in recipe.phases}
        self._rampup = filled(ema.rampup)
        self._used: dict[str, Used] = {}
        self._stage: Stage | None = None
        self._structure: tuple[int, bool] | None = None
        for arena in self.arenas.values():
            arena.module.train()
            mark_trained(arena.trained, False)

    def step(self, batch: Batch) -> None:
        """Take one step on this process's share of a batch; counts the whole batch as seen."""
        stage = self.recipe.schedule.at(self.images_seen)
        if 0 < stage.step == stage.first_step:  # moments of a network that was another one
            for optimizer in self.optimizers.values():
                optimizer.reset()
        self._enter(stage)
        images = batch.shown_on(self.device)
        labels = batch.labels.to(self.device, non_blocking=True)
        for phase in self.recipe.phases:
            if stage.step % phase.interval == 0:
                self.run_phase(phase, stage, images, labels)
        self.images_seen += stage.batch_size
        half_life = self.recipe.anneal(stage).ema_kimg
        for name, average in self.averages.items():
            decay = ema_decay(self.images_seen, stage.batch_size, half_life, self._rampup)
            average.update(decay, self._used[name].windows)
        for name, powers in self.power_averages.items():
            for power in powers:
                power.update(self.images_seen, stage.batch_size, self._used[name].windows)
        self.whole = True

    def run_phase(self, phase: Phase, stage: Stage, images: Tensor, labels: Tensor) -> None:
        """Update one network.

        Args:
            images: [batch_size / world_size, H, W, 3] uint8 on the device, this process's share in order of position.
            labels: [batch_size / world_size, c_dim] float32 on the device.
        """
        activity.note(f"{phase.name} after {self.images_seen / 1000:g} kimg")
        averages = self.gradients(phase, stage, images, labels)
        gradients, optimizer = self._used[phase.trains].gradients, self.optimizers[phase.trains]
        self.whole = False
        # One look at all gradients: where any is not finite, or their squares are not, the optimizer skips the update
        # on the device.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        failed = norm.isfinite().logical_not().float()
        self.record.stat(f"Gradient/{phase.name}/norm", norm)
        self.record.stat(f"Gradient/{phase.name}/not_finite", failed)
        count = self.skipped[phase.name]
        count.add_(failed)
        count[1].mul_(failed)
        annealed = self.recipe.anneal(stage)
        optimizer.step(stage.lr_multiplier * annealed.lr, failed, annealed.beta2)
        phase.after(averages, stage)

    def gradients(self, phase: Phase, stage: Stage, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Leave the gradient of a phase, the mean over all processes, in its network's arena.

        Args are those of `run_phase`. Returns the means of what the phase recorded for `Phase.after`.
        """
        self._enter(stage)
        used = self._used[phase.trains]
        rounds = len(images) // stage.batch_gpu
        assert rounds * stage.batch_gpu == len(images) == stage.batch_size // self.world_size
        mark_trained(used.parameters, True)
        torch._foreach_zero_(used.gradients)
        for index in range(rounds):
            activity.get_on()
            if used.averaging is not None and index == rounds - 1:
                used.averaging.watch(phase.name)
            micro_batch = self._micro_batch(phase, stage, images, labels, index, rounds)
            for term in phase.loss(micro_batch, self.record):
                (term * (phase.weight / rounds)).backward(inputs=used.parameters)
        mark_trained(used.parameters, False)
        averages = self.record.take_averages(rounds)
        return averages if used.averaging is None else used.averaging.finish(averages)

    def note_skipped(self) -> None:
        """Have the next tick report the counts of all phases, of those too that have not run since the last."""
        for name, count in self.skipped.items():
            self.record.latest(f"Gradient/{name}/skipped", count[0])
            self.record.latest(f"Gradient/{name}/{IN_A_ROW}", count[1])

    def state(self) -> dict[str, Tensor]:
        """Return every tensor that exact resuming needs, by name, without copying."""
        tensors = {f"recipe.{name}": tensor for name, tensor in self.recipe.state.items()}
        for name, arena in self.arenas.items():
            tensors[f"{name}.params"] = arena.params.detach()
            tensors |= {f"{name}.adam_{key}": value for key, value in self.optimizers[name].state.items()}
            kept = arena.module.state_dict().keys()
            buffers = {key: value for key, value in arena.module.named_buffers() if key in kept}
            tensors |= {f"{name}.buffer.{key}": value for key, value in buffers.items()}
        for name, average in self.averages.items():
            tensors[f"{name}.average"] = average.arena.params.detach()
        for name, powers in self.power_averages.items():
            tensors |= {f"{name}.{_POWER}{power.name}": power.params for power in powers}
            tensors[f"{name}.{_POWER_START}"] = torch.tensor(powers[0].start)
        return tensors | {f"{_SKIPPED}{name}": count for name, count in self.skipped.items()}

    def layout(self) -> dict[str, dict[str, list[int]]]:
        """Return the shape of every parameter by network and name: what a state must fit."""
        return {name: arena.layout for name, arena in self.arenas.items()}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], images_seen: int) -> None:
        """Take over what `state` returned; names and shapes must be those of this engine.

        What the recipe names optional may be missing, since its options may change within a run, and so may counts of
        phases that it did not have; it stays as it is. Power-function averages that are missing begin here.
        """
        self.images_seen = images_seen
        without = [name for name in self.power_averages if f"{name}.{_POWER_START}" not in tensors]
        for name, tensor in self.state().items():
            if name not in tensors and (name in self.recipe.optional or name.startswith(_SKIPPED)):
                continue
            if name.partition(f".{_POWER}")[0] in without:
                continue
            assert tensor.shape == tensors[name].shape, name
            tensor.copy_(tensors[name])
        for name, arena in self.arenas.items():
            for window in arena.frozen:  # a mean gradient from before they were frozen would go on moving them
                self.optimizers[name].state["exp_avg"][window].zero_()
        for name, powers in self.power_averages.items():
            for power in powers:
                if name in without:
                    power.begin(images_seen)
                else:
                    power.start = int(tensors[f"{name}.{_POWER_START}"])
        self._stage = self._structure = None  # the number of steps has changed
        self.whole = True

    def share_state(self) -> None:
        """Have every process go on as the main one does, which has loaded a state; all processes call this."""
        powers = [power for powers in self.power_averages.values() for power in powers]
        kept = [tensor for name, tensor in self.state().items() if not name.endswith(_POWER_START)]
        self.images_seen, starts = share_(kept, (self.images_seen, [power.start for power in powers]))
        for power, start in zip(powers, starts, strict=True):
            power.start = start
        self._stage = self._structure = None

    def _enter(self, stage: Stage) -> None:
        """Let the recipe follow the stage, and train what it uses, and nothing else; once is enough for a step."""
        if stage is self._stage:
            return
        self._stage = stage
        self.recipe.begin(stage)
        structure = (stage.resolution, stage.fading)
        if structure == self._structure:
            return
        self._structure = structure
        for name, modules in self.recipe.used_at(stage).items():
            parameters = {id(p) for module in modules for p in module.parameters()}
            arena = self.arenas[name]
            used = [p for p in arena.trained if id(p) in parameters]
            windows, averaging = arena.windows(used), None
            if self.world_size > 1:
                averaging = Averaging(arena, used, windows, self.world_size, self._exchange)
            assert arena.grad is not None
            self._used[name] = Used(used, windows, [arena.grad[window] for window in windows], averaging)
            self.optimizers[name].use(windows)

    def _optimizer(self, name: str, optim: OptimConfig) -> Adam:
        """Make Adam for one network, corrected for its lazy phase (arXiv:1912.04958, appendix B).

        c = k / (k + 1) for interval k; lr and the exponents of both betas are multiplied by c.
        """
        interval = max(phase.weight for phase in self.recipe.phases if phase.trains == name)
        correction = interval / (interval + 1) if interval > 1 else 1.0
        learning_rate = self.recipe.learning_rates[name] * correction
        return Adam(self.arenas[name], learning_rate, (filled(optim.beta1), filled(optim.beta2)), optim.eps, correction)

    def _micro_batch(
        self, phase: Phase, stage: Stage, images: Tensor, labels: Tensor, index: int, rounds: int
    ) -> MicroBatch:
        stride = rounds * self.world_size
        first = self.images_seen + index * self.world_size + self.rank
        positions = list(range(first, self.images_seen + stage.batch_size, stride))
        img = None
        if phase.uses_reals:
            img = images[index::rounds].permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)
            img.div_(127.5).sub_(1)
        return MicroBatch(positions, stage, img, labels[index::rounds])


def is_healthy(state: Mapping[str, Tensor]) -> bool:
    """Tell whether the last update of every phase had been made when `Engine.state` was taken, or copied to the CPU."""
    return all(float(count[1]) == 0 for name, count in state.items() if name.startswith(_SKIPPED))
