"""Whole steps next to model peers: which peers take part, and what their rows say."""

import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as command
from bench import model_peers
from bench.measure import timing
from bench.model_peers import step_rows
from bench.model_peers.peer import Work
from bench.peers import peer as peer_module
from bench.peers.peer import Unavailable
from bench.rows import show
from bench.studies import decode, e2e, prefill
from bench.studies.decode import DecodeCase, Tokens, time_decode
from bench.studies.prefill import PrefillCase, time_prefill
from model.config import PRESETS
from model.errors import InputError
from model.step3vl import Step3VL

CPU = torch.device("cpu")
CASE = DecodeCase(3, 70, 5)


@pytest.fixture(scope="module")
def tiny():
    return Step3VL.from_preset("tiny", seed=1)


@pytest.fixture
def quick(monkeypatch):
    """Few repeats."""
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)


@pytest.fixture
def nothing_installed(monkeypatch):
    def missing(module: str):
        raise Unavailable(f"not installed (No module named '{module}')")

    monkeypatch.setattr(model_peers.llama_cpp_peer, "imported", missing)
    monkeypatch.setattr(model_peers.transformers_peer, "imported", missing)

    def no_version(package: str):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(peer_module, "installed", no_version)


class Ours:
    """A peer that computes with our model, sequence by sequence, without sharing a prompt."""

    def __init__(self, model: Step3VL):
        self.model, self.calls = model, []

    def decode_step(self, prompt, suffixes):
        rows = [self.model(torch.cat([prompt, suffix]))[-1] for suffix in suffixes]
        return Work(lambda: torch.stack(rows), "by hand")

    def prefill(self, prompt):
        raise Unavailable("reads no prompts")

    def generator(self, prompts, lengths, temperature):
        def generate(prompt, many, on_step):
            self.calls.append((tuple(prompt), tuple(many), temperature))
            for step in range(max(many)):
                on_step(sum(length > step for length in many))

        return generate, "by hand"


class TestSelect:
    def test_default(self, monkeypatch):
        """Guards the default: our forms, and the peers that can be used, but only on a CPU."""
        usable = SimpleNamespace(name="b", absence=lambda config, device: None)
        missing = SimpleNamespace(name="a", absence=lambda config, device: "no")
        monkeypatch.setattr(model_peers, "PEERS", {"a": missing, "b": usable})
        forms, peers = model_peers.select((), ("eager", "default"), None, CPU, ("a", "b"))
        assert (forms, peers) == (("eager", "default"), [usable])
        assert model_peers.select((), ("eager",), None, CPU, ("a",)) == (("eager",), [])
        assert model_peers.select(("b", "eager"), ("eager", "x"), None, CPU) == (
            ("eager",),
            [usable],
        )

    def test_on_a_gpu(self):
        """Guards the peers' rows against CPU times next to a GPU's."""
        config, cuda = PRESETS["smollm2-135m"], torch.device("cuda")
        for peer in model_peers.PEERS.values():
            assert peer.absence(config, cuda) == "only measured on a CPU"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("decode", "--impl", "llama.cpp"), "llama.cpp is not installed; run: pip install lla"),
            (("e2e", "--impl", "transformers"), "transformers is not installed; run: pip install"),
            (("decode", "--impl", "fast"), "unknown form 'fast'; choose from: eager, default, lla"),
            (("decode", "--prefill", "10000"), "--prefill makes 10,000 tokens; the context of smo"),
            (("e2e", "--vision", "--impl", "eager"), "it takes no --impl"),
        ],
    )
    def test_mistakes(self, nothing_installed, arguments, message):
        """Guards the one line, which comes before any weights are read."""
        with pytest.raises(InputError) as error:
            command.main([*arguments, "--device", "cpu"])
        assert message in str(error.value)

    def test_a_model_without_a_gguf_file(self, monkeypatch):
        """Guards against an answer of another model: llama.cpp runs what is in a GGUF file."""
        monkeypatch.setattr(model_peers.llama_cpp_peer, "library", lambda: None)
        monkeypatch.setattr(peer_module, "installed", lambda name: "0.3.36")
        with pytest.raises(
            InputError, match="llama.cpp: needs a GGUF file.*leave it out of --impl"
        ):
            model_peers.select(("llama.cpp",), (), PRESETS["tiny"], CPU)

    def test_a_peer_alone_cannot_answer(self, monkeypatch):
        """Guards `e2e`: a peer's work is as long as our rollouts."""
        usable = SimpleNamespace(name="transformers", absence=lambda config, device: None)
        monkeypatch.setitem(model_peers.PEERS, "transformers", usable)
        with pytest.raises(InputError, match="add eager or default"):
            next(e2e.run(CPU, ("transformers",)))


class TestDecode:
    def test_all_read_the_same_tokens(self, quick, tiny):
        """Guards the comparison: our pages hold the KV of the peers' tokens, in the same order, so
        that logits agree; without peers they hold random numbers, as in all earlier rows."""
        rows = time_decode(tiny, CASE, peers={"transformers": Ours(tiny)})
        assert [row["impl"] for row in rows] == ["eager", "default", "transformers"]
        assert all(row["max_err"] < 1e-4 for row in rows)
        assert rows[2]["settings"] == "by hand"
        assert rows[2]["speedup"] > 0
        _, random = decode.prepare(CASE, tiny)
        _, real = decode.prepare(CASE, tiny, Tokens.of(CASE, tiny))
        assert not torch.equal(random.k, real.k)

    def test_suffixes_of_one_token(self, quick, tiny):
        """Guards a step directly after the prompt."""
        case = DecodeCase(2, 20, 1)
        rows = time_decode(tiny, case, peers={"transformers": Ours(tiny)})
        assert all(row["max_err"] < 1e-4 for row in rows)

    def test_only_peers(self, quick, tiny):
        """Guards `--impl llama.cpp` against rows of forms that were not asked for."""
        rows = time_decode(tiny, CASE, names=(), peers={"transformers": Ours(tiny)})
        assert [row["impl"] for row in rows] == ["transformers"]
        assert rows[0]["speedup"] is None


class TestPrefill:
    def test_rows(self, tiny, monkeypatch, capsys):
        """Guards tokens per second, few repeats of calls that take seconds, and the row of a peer
        that cannot do the work."""
        monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)
        rows = time_prefill(tiny, PrefillCase(70), decode.FORMS, {"transformers": Ours(tiny)}, 0)
        assert [row["impl"] for row in rows] == ["eager", "default", "transformers"]
        assert {row["op"] for row in rows} == {"prefill"}
        assert {row["case"] for row in rows} == {"tiny N70"}
        for row in rows[:2]:
            assert row["repeats"] == prefill.MIN_REPEATS < timing.MIN_REPEATS
            assert row["max_err"] < 1e-4
            assert row["tokens_per_second"] * row["median_us"] == pytest.approx(70e6)
        assert rows[2]["skipped"] == "reads no prompts"
        assert rows[2]["median_us"] is None
        assert set(tiny.impl.values()) == {None}
        show.times(rows)
        out = capsys.readouterr().out
        assert "skipped: transformers: reads no prompts" in out
        assert "tokens/s" in out

    def test_chunks(self, tiny, monkeypatch):
        """Guards a prompt longer than a step of the engine: its chunks read those before them."""
        monkeypatch.setattr(prefill, "TOKEN_BUDGET", 32)
        logits = []
        monkeypatch.setattr(
            prefill, "compare", lambda a, b: logits.append(a) or step_rows.Error(0, 0)
        )
        monkeypatch.setattr(timing, "MAX_REPEATS", 1)
        time_prefill(tiny, PrefillCase(70), {"default": None}, {}, 0)
        expected = tiny(prefill.random_ids(70, tiny))[-1:]
        torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)

    def test_flops(self, tiny):
        """Guards the operations against torch's own count, which leaves out the norms and has all
        of attention's square; causal attention needs half of it."""
        config, tokens = tiny.config.decoder, 70
        tiny.set_impl("eager")
        with FlopCounterMode(display=False) as counter:
            tiny(prefill.random_ids(tokens, tiny))
        tiny.set_impl(None)
        masked = 4 * config.layers * config.heads * config.head_dim * tokens * (tokens - 1) // 2
        other_logits = 2 * (tokens - 1) * config.vocab_size * config.hidden
        counted = counter.get_total_flops() - masked - other_logits
        assert PrefillCase(tokens).flops(config) == pytest.approx(counted, rel=0.002)

    def test_which_steps_are_measured(self):
        """Guards the sizes: prompts alone, steps alone, both, and the default of both."""

        def sizes(**given):
            names = ("batch", "prefix", "suffix", "prefill")
            options = SimpleNamespace(
                model="tiny", rope_scaling=None, **dict.fromkeys(names, ()) | given
            )
            steps, prompts = (
                decode.selected_steps(options, CPU),
                decode.selected_prompts(options, CPU),
            )
            return len(steps), [prompt.tokens for prompt in prompts]

        assert sizes() == (2, [512])
        assert sizes(prefill=(7, 8)) == (0, [7, 8])
        assert sizes(batch=(16,)) == (1, [])
        assert sizes(batch=(16,), prefill=(7,)) == (1, [7])

    def test_command(self, quick, capsys):
        """Guards the way from the command line to rows."""
        arguments = ["decode", "--model", "tiny", "--prefill", "9", "--impl", "default", "--json"]
        assert command.main([*arguments, "--device", "cpu"]) == 0
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        assert (row["op"], row["case"], row["impl"]) == ("prefill", "tiny N9", "default")


def test_an_answer(tiny, monkeypatch):
    """Guards the peer's work: our rounds' prompts and lengths at our temperature, and its rates."""
    monkeypatch.setattr(e2e, "PROMPT_TOKENS", 200)
    answers, peer_run, peer = [], e2e._peer_run, Ours(tiny)

    def recorded(peer, ids, answer):
        answers.append(answer)
        return peer_run(peer, ids, answer)

    monkeypatch.setattr(e2e, "_peer_run", recorded)
    rows = e2e.ask(tiny, (4,), 6, forms=("default",), peers={"transformers": peer})
    ours, theirs = rows
    assert [row["impl"] for row in rows] == ["default", "transformers"]
    assert theirs["bytes"] == ours["bytes"]
    assert theirs["settings"] == "by hand"
    assert "timeline" not in theirs and theirs["max_err"] is None
    (first, widths, temperature), (second, (last,), _) = peer.calls
    assert (len(widths), temperature) == (4, 1.0)
    assert [len(first), len(second)] == [r.prompt_tokens for r in answers[0].rounds]
    assert (first * 9)[: len(second)] == second
    tokens = ours["tokens_per_second"] * ours["median_us"] / 1e6
    assert sum(widths) + last == round(tokens)
    show.whole_runs(rows)
