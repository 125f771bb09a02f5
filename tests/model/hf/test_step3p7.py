"""Step3p7's vision tower of transformers, patched, against itself unpatched."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernels.gemm import convolution
from model.hf import patch, step3p7, unpatch, vision
from tests.model.hf.towers import OPS, drawn, errs_no_more, ops_called, views
from tests.support.errors import max_error

pytestmark = pytest.mark.judge

PATCH, SIDE = 4, 8  # pixels of a patch, patches of the position embedding's side
GRIDS = [(8, 8), (6, 5), (3, 7)]  # its own, and interpolated ones
SMALL = (3, 4)  # for the interpreter
SELECTIONS = [None, *((op,) for op in (*OPS, "projector"))]


def config(**options):
    from transformers import Step3p7VisionConfig

    return Step3p7VisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        patch_size=PATCH,
        image_size=PATCH * SIDE,
        max_position_embeddings=SIDE**2,
        layer_norm_eps=1e-2,
        rope_parameters={"rope_type": "axial", "rope_theta": 100.0},
        **options,
    )


@pytest.fixture(scope="module")
def judge() -> nn.Module:
    from transformers import Step3p7VisionModel

    return drawn(Step3p7VisionModel(config()))


@pytest.fixture
def tower(judge) -> nn.Module:
    return deepcopy(judge)


@torch.inference_mode()
def tokens(tower: nn.Module, grid: tuple[int, int]) -> Tensor:
    weight = tower.downsampler1.weight
    pixels = views(2, *grid, PATCH).to(weight)
    return tower(pixels).last_hidden_state


@pytest.mark.parametrize("impl", ["eager", "portable"])
@pytest.mark.parametrize("ops", SELECTIONS, ids=str)
def test_every_op_alone_and_together(judge, tower, ops: tuple | None, impl: str):
    """Guards each op's own part, which must also work with the library's other parts: the order of
    q's and k's elements, the grid, LayerScale, both residual adds, the weights of each norm."""
    patch(tower, ops, impl=impl)
    for grid in GRIDS:
        assert max_error(tokens(tower, grid), tokens(judge, grid)) < 1e-5


@pytest.mark.interpreter
@pytest.mark.parametrize("ops", SELECTIONS, ids=str)
def test_every_op_in_triton(judge, tower, triton_device: str, ops: tuple | None):
    """Guards the same in Triton, whose convolutions read packed tokens of each view's grid."""
    tower.to(triton_device)
    patch(tower, ops, impl="triton")
    error = max_error(tokens(tower, SMALL).cpu(), tokens(judge, SMALL))
    assert error < (1e-5 if triton_device == "cpu" else 1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("impl", ["portable", "triton"])
def test_bf16(judge, tower, triton_device: str, impl: str):
    """Guards against a lost digit: in bf16 the patched tower must be as near to fp32 as the
    library's."""
    device = "cpu" if impl == "portable" else triton_device
    for parameter in tower.parameters():
        parameter.data = parameter.to(device, torch.bfloat16)
    tower.to(device)
    theirs = tokens(tower, SMALL)
    patch(tower, impl=impl)
    assert errs_no_more(tokens(tower, SMALL).cpu(), theirs.cpu(), tokens(judge, SMALL))


def test_the_ops_are_called(tower):
    """Guards against a patch that leaves the library's code, whose results are right, too."""
    called = {"layer_norm": 5, "linear_quick_gelu": 2, "vision_attention": 2, "quick_gelu": 2}
    # quick_gelu is part of linear_quick_gelu; of vision_attention, the rotary embedding is patched.
    expected = {"layer_norm": 5, "linear_quick_gelu": 2, "projector": 2, "vision_attention": 3}
    assert patch(tower) == expected
    assert ops_called(lambda: tokens(tower, SMALL)) == called
    unpatch(tower)
    assert not ops_called(lambda: tokens(tower, SMALL))


@pytest.mark.parametrize("impl", ["eager", "portable"])
def test_impl_reaches_every_op(tower, impl: str, monkeypatch: pytest.MonkeyPatch):
    """Guards a form that was asked for by name, also of the op for other linear layers."""
    impls = []

    def spied(op: Callable) -> Callable:
        def spy(*args, impl: str, **options):
            impls.append(impl)
            return op(*args, impl=impl, **options)

        return spy

    for name in (*OPS, "quick_gelu"):
        monkeypatch.setattr(vision, name, spied(getattr(vision, name)))
    tower.layers[0].mlp.fc1.__class__ = Doubled
    patch(tower, impl=impl)
    tokens(tower, SMALL)
    assert impls == [impl] * 9


@pytest.mark.interpreter
def test_convolutions_are_called(tower, triton_device: str, monkeypatch: pytest.MonkeyPatch):
    """Guards the same for the convolutions in Triton, and against a batch taken for one view."""
    grids = []

    def spy(tokens: Tensor, of: list, *weights: Tensor) -> Tensor:
        grids.append(of)
        return convolution(tokens, of, *weights)

    monkeypatch.setattr(step3p7, "convolution", spy)
    tower.to(triton_device)
    patch(tower, ["projector"], impl="triton")
    tokens(tower, SMALL)
    assert grids == [[SMALL] * 2, [(2, 2)] * 2]


@pytest.mark.interpreter
def test_unpatch_restores_every_bit(judge, tower, triton_device: str, tmp_path: Path):
    """Guards the library's forward, and a state that is saved as before although the convolutions'
    weights lie in memory as Triton reads them."""
    tower.to(triton_device)
    state = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    expected = tokens(tower, (6, 5))
    patch(tower)
    patch(tower, ["projector"], impl="triton")
    tokens(tower, SMALL)
    unpatch(tower)
    assert not any("forward" in module.__dict__ for module in tower.modules())
    assert max_error(tokens(tower, (6, 5)), expected) < 1e-5  # another layout, another order
    assert tower.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tower.state_dict().items())
    tower.save_pretrained(tmp_path)
    again = type(tower).from_pretrained(tmp_path)
    assert torch.equal(tokens(again, (6, 5)), tokens(judge, (6, 5)))
    patch(again), unpatch(again)
    assert torch.equal(tokens(again, (6, 5)), tokens(judge, (6, 5)))


def test_copies_and_new_weights(judge, tower):
    """Guards against a copy that computes with the original's weights, and against weights that
    were derived from old ones."""
    patch(tower)
    copy = deepcopy(tower)
    drawn(tower, seed=1)
    assert max_error(tokens(copy, (6, 5)), tokens(judge, (6, 5))) < 1e-5
    changed = deepcopy(tower)
    unpatch(changed)
    assert max_error(tokens(tower, (6, 5)), tokens(changed, (6, 5))) < 1e-5


class Doubled(nn.Linear):
    """Like LoRA and quantised layers: `weight` is not all that it computes with."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_other_linear_layers_compute_themselves(judge, tower):
    """Guards against an adapter that is left out."""
    expected = deepcopy(judge)
    patch(tower)
    for model in (tower, expected):
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "v_proj", "fc1")):
                module.__class__ = Doubled
    assert max_error(tokens(tower, (6, 5)), tokens(expected, (6, 5))) < 1e-5


def test_recorded_outputs(judge, tower):
    """Guards what the library records: hidden states, before the convolutions and after."""
    patch(tower)
    pixels = views(2, 6, 5, PATCH)
    with torch.inference_mode():
        ours, theirs = (
            model(pixels, output_hidden_states=True).hidden_states for model in (tower, judge)
        )
    assert len(ours) == len(theirs) == 3
    for state, expected in zip(ours, theirs, strict=True):
        assert max_error(state, expected) < 1e-5


def test_inside_the_whole_model(judge, tower):
    """Guards the features that the text model gets, of global and local views, and the refusal of
    its other parts by name."""
    from transformers import Step3p7Config, Step3p7ForConditionalGeneration

    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    model = drawn(
        Step3p7ForConditionalGeneration(
            Step3p7Config(vision_config=config(), text_config=text, image_token_id=31)
        )
    )
    inputs = views(2, 8, 8, PATCH), views(3, 6, 6, PATCH), [2, 1]
    with torch.inference_mode():
        expected = model.get_image_features(*inputs).pooler_output
        with pytest.raises(ValueError, match="patch: Step3p7ForConditionalGeneration is not known"):
            patch(model)
        patch(model.model.vision_model)
        features = model.get_image_features(*inputs).pooler_output
    assert [len(x) for x in features] == [len(x) for x in expected] == [2 * 4 + 4, 4 + 4]
    assert max_error(torch.cat(features), torch.cat(expected)) < 1e-5


def test_refusals(judge, tower):
    """Guards settings whose results would be wrong."""
    from transformers import Step3p7VisionModel

    gelu = Step3p7VisionModel(config(hidden_act="gelu"))
    with pytest.raises(
        ValueError,
        match=r"^patch: linear_quick_gelu does not fit Step3p7VisionMLP \(layers.0.mlp\): its"
        " activation GELUActivation is not quick_gelu$",
    ):
        patch(gelu)
    assert patch(gelu, ["layer_norm"]) == {"layer_norm": 5}
    tower.downsampler2 = nn.Sequential(tower.downsampler2)
    with pytest.raises(
        ValueError, match=r"Sequential \(downsampler2\): it is Sequential, not Conv2d"
    ):
        patch(tower)
    for name, message in (
        ("pre_layernorm", r"RMSNorm \(pre_layernorm\): it is RMSNorm, not LayerNorm"),
        ("layers.1.layernorm_after", r"EncoderLayer \(layers.1\): it is RMSNorm, not LayerNorm"),
    ):
        other = deepcopy(judge)
        other.set_submodule(name, nn.RMSNorm(32))
        with pytest.raises(ValueError, match=f"^patch: layer_norm does not fit .*{message}$"):
            patch(other)


@torch.inference_mode()
def test_refusals_at_the_call(judge):
    """Guards masks, which the op does not take, and an attention without its rotation."""
    layer = deepcopy(judge).layers[0]
    patch(layer)
    rotary = judge.rotary_emb(torch.zeros(1), torch.zeros(6, 2))
    with pytest.raises(ValueError, match="patched, but not the tower's rotary embedding"):
        layer(torch.zeros(1, 6, 32), position_embeddings=rotary)
    with pytest.raises(ValueError, match="vision_attention: takes no attention_mask"):
        layer(torch.zeros(1, 6, 32), torch.zeros(1, 1, 6, 6), position_embeddings=rotary)
