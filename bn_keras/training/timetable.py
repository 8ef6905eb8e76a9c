"""The steps at which a run does something besides training."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Timetable:
    """Which steps are followed by a line of metrics, an evaluation, a checkpoint or a recording.

    Each is due after the multiples of its period. Steps count from 1: step k is the k-th update.

    Attributes:
      steps: last step of the run.
      steps_per_loop: period of the lines of metrics.
      evaluation_steps, checkpoint_steps: periods of evaluations and checkpoints.
      record_steps: period of recordings of a layer's input; None records nothing.
      profile_steps: number of steps to profile, the last ones before the first stop.
    """

    steps: int
    steps_per_loop: int
    evaluation_steps: int
    checkpoint_steps: int
    record_steps: int | None = None
    profile_steps: int = 0

    def next_loop_end(self, step: int) -> int:
        """Returns the next step after which more than a recording may be due."""
        periods = (self.steps_per_loop, self.evaluation_steps, self.checkpoint_steps)
        return min(self.steps, *(_next_multiple(step, period) for period in periods))

    def next_stop(self, step: int, profile_from: int | None = None) -> int:
        """Returns the step up to which the device trains without interruption.

        Args:
          step: last step trained.
          profile_from: step after which the profiler starts; None if it does not run.
        """
        stops = [self.next_loop_end(step)]
        if self.record_steps is not None:
            stops.append(_next_multiple(step, self.record_steps))
        if profile_from is not None and profile_from > step:
            stops.append(profile_from)
        return min(stops)

    def profile_from(self, step: int) -> int | None:
        """Returns the step after which a run that starts at `step` profiles; None for never."""
        if not self.profile_steps:
            return None
        return max(step, self.next_stop(step) - self.profile_steps)

    def is_loop_end(self, step: int) -> bool:
        """Returns whether metrics, an evaluation or a checkpoint may be due after a step."""
        return self.next_loop_end(step - 1) == step

    def is_evaluation(self, step: int) -> bool:
        """Returns whether an evaluation is due after a step, apart from the one at the end."""
        return step % self.evaluation_steps == 0 and step < self.steps

    def is_checkpoint(self, step: int) -> bool:
        """Returns whether a periodic checkpoint is due after a step."""
        return step % self.checkpoint_steps == 0

    def is_recording(self, step: int) -> bool:
        """Returns whether a recording of a layer's input is due after a step."""
        return self.record_steps is not None and step % self.record_steps == 0


def _next_multiple(step: int, period: int) -> int:
    return step - step % period + period
