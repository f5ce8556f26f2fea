import verifiers.v1 as vf

__all__ = ["SumsTaskset"]


class SumsData(vf.TaskData):
    answer: str


class SumsTask(vf.Task[SumsData]):
    @vf.reward(weight=1.0)
    async def length(self, trace: vf.Trace) -> float:
        return len(trace.last_reply) / 16

    @vf.metric
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply.strip() == self.data.answer)


class SumsConfig(vf.TasksetConfig):
    num_tasks: int = 100


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    def load(self) -> list[SumsTask]:
        return [
            SumsTask(SumsData(prompt=f"{i % 10}+{i // 10}=", answer=str(i % 10 + i // 10)), self.config.task)
            for i in range(self.config.num_tasks)
        ]
