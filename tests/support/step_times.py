"""Steps that all take the same time."""

from dataclasses import dataclass

from minisrv.simulation.step_times import StepWork


@dataclass(frozen=True)
class SteadyTimes:
    host: float
    device: float

    def host_s(self, work: StepWork) -> float:
        return self.host

    def device_s(self, work: StepWork) -> float:
        return self.device
