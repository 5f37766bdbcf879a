"""A session goes through its stages once, in order; whatever goes wrong ends it for good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from secagg_kit import DIM, Scene, vectors

from privacy.errors import Aborted, Refused
from privacy.secagg import prg
from privacy.secagg.site import SiteSession
from simulations.adversary import Consortium, Hook

STAGES = ("m1", "m3", "m5", "m7", "m9")
INBOUND = {"m1": "m0", "m3": "m2", "m5": "m4", "m7": "m6", "m9": "m8"}


class Kept(Scene):
    """Site 0 stops before a stage; `messages` holds all that it would have got, from a whole round of others' making."""

    def until(self, stage: str) -> Kept:
        self.messages = dict[str, bytes]()

        def hook(message: str, u: int, data: bytes) -> bytes | None:
            if u == 0:
                self.messages[message] = data
            return None if (message, u) == (INBOUND[stage], 0) else data

        self.play(hook)
        self.site = self.sites[0]
        return self

    def ask(self, stage: str, data: bytes | None = None) -> object:
        """The stage's method with what came for it, or for the last stage that anything came for."""
        inbound = self.messages.get(INBOUND[stage], list(self.messages.values())[-1]) if data is None else data
        if stage == "m1":
            return self.site.m1()
        if stage == "m5":
            return self.site.m5(inbound, np.zeros(DIM, np.uint32))
        return getattr(self.site, stage)(inbound)

    def over(self) -> None:
        """No secret is left, and nothing brings the session back: neither what it waited for nor what it answered."""
        assert self.site._secrets is None
        for stage in STAGES * 2:
            with pytest.raises(Aborted, match=r"secagg\.stage"):
                self.ask(stage)
            assert self.site._secrets is None


@pytest.mark.parametrize("stage", STAGES[1:])
def test_abort_is_terminal(consortium: Consortium, stage: str) -> None:
    scene = Kept.of(consortium).until(stage)
    with pytest.raises(Aborted, match=r"secagg\.message"):
        scene.ask(stage, b"{}")
    scene.over()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("failure", "code"), [
    (Refused("identity.revoked", "The certificate was revoked.", "Renew it."), "identity"),
    (Refused("journal.write_failed", "The disk is full.", "Make room."), "internal"), (MemoryError(), "internal"),
    (ValueError("secret bytes"), "internal"), (Aborted("secagg.stale", "Begun before.", "Begin anew."), "stale")],
    ids=["identity", "refused", "memory", "value", "aborted"])
def test_any_failure_is_terminal(consortium: Consortium, stage: str, failure: BaseException, code: str) -> None:
    """Also of what is not this package's, at any stage; and its text does not become the session's."""
    class Fails:
        def __getattr__(self, name: str) -> Any:
            raise failure

    scene = Kept.of(consortium).until(stage)
    scene.site._journal = scene.site.signer = Fails()  # type: ignore[assignment]
    with pytest.raises(Aborted, match=rf"secagg\.{code}") as caught:
        scene.ask(stage)
    assert "secret bytes" not in str(caught.value)
    scene.over()


def test_an_interrupt_ends_the_session_and_the_process(consortium: Consortium) -> None:
    class Fails:
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    scene = Kept.of(consortium).until("m5")
    scene.site._journal = scene.site.signer = Fails()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        scene.ask("m5")
    scene.over()


def test_failure_after_masking_is_terminal(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory right after the masks were added: the same M4 must not mask the vector a second time."""
    scene, real = Kept.of(consortium).until("m5"), prg.add_masks

    def full(*args: Any) -> None:
        real(*args)
        raise MemoryError

    with monkeypatch.context() as m:
        m.setattr(prg, "add_masks", full)
        with pytest.raises(Aborted, match=r"secagg\.internal"):
            scene.ask("m5")
    scene.over()


@pytest.mark.parametrize("stage", STAGES)
def test_expired_session_is_over(consortium: Consortium, stage: str) -> None:
    """Whatever it waited for; also after its last message."""
    scene = Kept.of(consortium).until(stage)
    scene.site.expire()
    scene.over()
    done = Scene.of(consortium)
    done.play(lambda message, u, data: data)
    done.sites[0].expire()
    assert done.sites[0]._secrets is None and done.sites[0]._last is None


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("other", STAGES)
def test_stages_come_in_order(consortium: Consortium, stage: str, other: str) -> None:
    """Another stage's message, though well formed, ends the session; the one answered last is answered again."""
    scene = Kept.of(consortium).until(stage)
    if other == stage:
        return
    if STAGES.index(other) == STAGES.index(stage) - 1:
        assert scene.ask(other) is scene.ask(other)
        scene.ask(stage)
        return
    with pytest.raises(Aborted, match=r"secagg\.stage"):
        scene.ask(other)
    scene.over()


@pytest.mark.parametrize("stage", STAGES)
def test_redelivery_gets_the_stored_reply_and_changes_nothing(consortium: Consortium, stage: str) -> None:
    """Each message to site 0 comes three times; the round is as if it had come once."""
    scene, answers = Scene.of(consortium), list[object]()

    def ask(call: Callable[..., Any]) -> Callable[..., Any]:
        def thrice(*args: Any) -> Any:
            got = [call(*args) for _ in range(3)]
            answers.append(got[0])
            assert got[0] is got[1] is got[2]
            return got[0]

        return thrice

    setattr(scene.sites[0], stage, ask(getattr(scene.sites[0], stage)))
    played = scene.play(lambda message, u, data: data)
    assert len(answers) == 1 and not played.refused
    assert np.array_equal(played.total, np.sum(vectors(scene.offer), axis=0, dtype=np.uint32))


def test_redelivery_of_nothing_is_no_key_list(consortium: Consortium) -> None:
    """M1 answers no message; an empty M2 is not its repetition."""
    scene = Scene.of(consortium)
    scene.sites[0].m1()
    with pytest.raises(Aborted, match=r"secagg\.message"):
        scene.sites[0].m3(b"")


def test_m1_is_recorded_before_the_key_leaves(consortium: Consortium) -> None:
    scene = Scene.of(consortium)
    scene.sites[0].m1()
    assert scene.sites[0]._journal.starts == [("ab" * 16, (1, 0, 1))]  # type: ignore[attr-defined]


def test_secrets_are_dropped_with_the_reference(consortium: Consortium) -> None:
    """After the last message no object of the session leads to a secret."""
    scene = Scene.of(consortium)
    hook: Hook = lambda message, u, data: data  # noqa: E731
    secrets = [site._secrets for site in scene.sites]
    scene.play(hook)
    for own, site in zip(secrets, scene.sites, strict=True):
        assert own is not None and isinstance(site, SiteSession)
        hidden = {id(own), id(own.b), id(own.key), *map(id, own.pairs.values()), *map(id, own.held.values())}
        assert not hidden & {id(value) for value in vars(site).values()}
