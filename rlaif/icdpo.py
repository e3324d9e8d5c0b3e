"""In-context DPO's scores: how much more probable demonstrations make a response (Song et al., arXiv 2402.09320)."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from rlaif.data import Item
from rlaif.label.judge import Ask
from rlaif.records import Request, Row, RowError
from rlaif.sample import InContext


@dataclass(frozen=True)
class InContextDpo:
    """Scores a response y to x by log π(y | demonstrations, x) − log π(y | x), under one model.

    By DPO's own derivation that is β⁻¹ times the reward for which the model with demonstrations would be the optimal policy,
    and the one without them its reference, up to a constant of x: so scores compare responses to one prompt. A
    log-probability is the sum over the response's tokens, without an end, in nats.

    `icl`: the template and its demonstrations, rendered as `rlaif sample --icl` does. Without demonstrations the same template
    is rendered with none, so that nothing else differs. `against`: another context in that one's place, such as one of bad
    answers, which makes the paper's contrastive score.
    """

    icl: InContext
    against: InContext | None = None

    def settings(self) -> dict[str, Any]:
        """Everything about the method that can change a score."""
        against = self.against.settings() if self.against else None
        return {"method": "icdpo", "icl": self.icl.settings(), "against": against}

    def failed(self, problem: str | None) -> Row:
        """The result of a row that could not be scored."""
        return {"status": "error", "score": None, "scores": None, "dispersion": None, "votes": [], "error": problem}

    async def __call__(self, item: Item, ask: Ask) -> Row:
        """`score`, the difference, any number; `scores`, both log-probabilities: `with`, and `without` or `against`."""
        other, name = (self.against, "against") if self.against else (self.icl, "without")
        requests = request(self.icl, item), request(other, item, shown=self.against is not None)
        try:
            found = await asyncio.gather(*(ask(one) for one in requests))
        except RowError as error:
            return self.failed(str(error))
        first, second = (completion.logprob for completion in found)
        if first is None or second is None or not math.isfinite(first - second):
            return self.failed("the response's log-probability is not a finite number")
        scores = {"with": first, name: second}
        return {"status": "ok", "score": first - second, "scores": scores, "dispersion": None, "votes": [], "error": None}


def request(icl: InContext, item: Item, shown: bool = True) -> Request:
    """What asks for the log-probability of the item's response in a context: the last message, after `prefix`."""
    exemplars = [exemplar.model_dump() for exemplar in icl.answers.exemplars] if shown else []
    turns, prefix = icl.template.render(prompt=item.prompt, row=item.row, exemplars=exemplars)
    return Request((*turns, {"role": "assistant", "content": item.row["response"]}), prefix, logprob=True)
