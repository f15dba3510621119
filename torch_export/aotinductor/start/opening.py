"""The two halves of a start: what can be known before any weight is touched, and the rest."""

from collections.abc import Callable
from typing import NamedTuple

from aotinductor.lengths import Plan
from aotinductor.start.engine import Engine
from aotinductor.start.loading import Wish, load_engine
from common.artifact.disk import ArtifactPair, TrustFlags
from common.cli import Console, SharedFlags
from common.model.target import Target, choose_target
from common.model.tokenizer import TextCodec, load_codec


class Opening(NamedTuple):
    """A start whose model, device and lengths are known: prompts can be made and checked."""

    wish: Wish
    target: Target
    plan: Plan
    codec: TextCodec

    def load(
        self, console: Console, close_stage: Callable[[str], None] = lambda name: None
    ) -> Engine:
        """Check the package, load it, and bring the weights to the device."""
        found, artifact = load_engine(self.wish, self.target, self.plan, close_stage, console)
        return Engine(found, self.target, self.plan, self.codec, artifact)

    def warmed_up_with(self, padded_tokens: int) -> "Opening":
        """Return the same for a first prompt of this length."""
        return self._replace(wish=self.wish._replace(warm_up_tokens=padded_tokens))


def make_opening(
    pair: ArtifactPair, shared: SharedFlags, trust: TrustFlags, plan: Plan, console: Console
) -> Opening:
    """Return an opening by a plan, with a package or without; without a model, of its own."""
    if not shared.model_id and plan.manifest:
        shared = shared.changed(model_id=plan.manifest.model["id"])
    target = choose_target(plan.fill_in(shared), console, plan.checkpoint)
    return Opening(Wish(pair, trust), target, plan, load_codec(target.checkpoint))
