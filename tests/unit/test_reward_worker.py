"""A reward worker whose reward hangs says which group it was at, hands back the others, and ends with the reason."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from actors.reward_worker import RewardWorker
from raysteer.errors import DeadlineExceeded
from rewards.base import Scores

IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


class Hanging:
    """Never returns for one prompt, until the test lets it."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        if prompts[0] == "hang":
            self.release.wait()
        return Scores(np.zeros(len(images), np.float32), {})


def test_only_the_group_at_which_the_reward_hangs_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = Hanging()
    monkeypatch.setattr("rewards.base.build_reward", lambda *_: reward)

    async def story() -> None:
        worker = RewardWorker("w", None, "cpu")  # type: ignore[arg-type]
        worker.timeout_s = 0.5
        worker._ended = asyncio.get_running_loop().create_future()
        prompts = ("fine", "hang", "behind", "behind")
        outcomes = await asyncio.gather(*(worker.score(IMAGES, prompt) for prompt in prompts))
        assert [outcome.kind for outcome in outcomes] == ["scored", "retryable", "untried", "untried"]
        assert outcomes[1].reason == "reward_timeout" and "w: the reward gave no score" in outcomes[1].detail
        assert (await worker.score(IMAGES, "late")).kind == "untried"
        with pytest.raises(DeadlineExceeded, match=r"for the reward to score; .*reward_workers\.timeout_s"):
            await worker._ended

    try:
        asyncio.run(story())
    finally:
        reward.release.set()
