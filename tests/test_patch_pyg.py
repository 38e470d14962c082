"""fuse_ on the MLP-Mixer in PyTorch Geometric's GraphMixer."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import check_fused, run
from torch import nn
from torch_geometric.nn.models.graph_mixer import LinkEncoder, _MLPMixer

from mixer_kernels import freeze_, functional, fuse_, unfuse_

S, C = 10, 16


def mixer(dropout: float = 0.0, tokens: int = S) -> _MLPMixer:
    """With norms and biases that are not 1 and 0."""
    model = _MLPMixer(num_tokens=tokens, in_channels=C, out_channels=5, dropout=dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.dim() == 1 else 0.0) * torch.randn_like(parameter)
    return model


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The options of each call of functional.mixer_block."""
    seen, original = [], functional.mixer_block
    monkeypatch.setattr(functional, "mixer_block", lambda *a, **k: seen.append(k) or original(*a, **k))
    return seen


@pytest.mark.usefixtures("through_functional")
def test_the_mixer(calls) -> None:
    report = check_fused(mixer(), torch.randn(3, S, C))
    assert [(entry.block, entry.detail) for entry in report] == [("_MLPMixer", "functional.mixer_block, then its head")]
    assert len(calls) == 2 and calls[0]["eps"] == (1e-5, 1e-5)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_mixer_on_the_kernels(dtype, device) -> None:
    check_fused(mixer(tokens=7), torch.randn(2, 7, C, device=device).to(dtype), backend="triton")


def test_inference_on_the_cpu_kernels() -> None:
    model, x = mixer().eval(), torch.randn(3, S, C)
    exact = copy.deepcopy(model).double()
    fuse_(model, backend="cpu")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), exact(x.double()).float())
            model.token_lin1.weight.mul_(2), exact.token_lin1.weight.mul_(2)


def links(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(6, (2, 80), generator=generator)
    times = torch.rand(80, generator=generator, dtype=torch.float64).float()
    return edge_index, torch.randn(80, 4, generator=generator), times, torch.ones(6)


@pytest.mark.usefixtures("through_functional")
def test_link_encoder(calls) -> None:
    """GraphMixer's: its mixer takes the latest links of each node."""
    encoder = LinkEncoder(k=S, in_channels=4, hidden_channels=C, out_channels=5, time_channels=6).eval()
    edge_index, attributes, times, seeds = links()

    def output(model: nn.Module) -> list[torch.Tensor]:
        class Attributes(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = model

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.encoder(edge_index, x, times, seeds)

        return run(Attributes(), attributes)

    expected = output(encoder)
    assert [entry.name for entry in fuse_(encoder)] == ["mlp_mixer"]
    for ours, theirs in zip(output(encoder), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) == 1
    unfuse_(encoder)
    assert all(torch.equal(a, b) for a, b in zip(output(encoder), expected, strict=True))


@pytest.mark.usefixtures("through_functional")
def test_dropout_follows_the_mode(calls) -> None:
    model, x = mixer(dropout=0.3).train(), torch.randn(3, S, C)
    torch.manual_seed(3)
    expected = model(x)
    fuse_(model)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), expected)
    model.dropout = 0.1
    model(x), model.eval()(x)
    assert [call["dropout_p"] for call in calls] == [0.3, 0.1, 0.0]


@pytest.mark.usefixtures("through_functional")
def test_what_is_left_and_what_is_the_heads_own(calls) -> None:
    x, seen = torch.randn(3, S, C), []
    model = mixer().eval()
    model.head_lin.register_forward_hook(lambda *_: seen.append("head"))  # is called as it is
    expected = model(x)
    fuse_(model)
    torch.testing.assert_close(model(x), expected)
    assert seen == ["head", "head"] and len(calls) == 1
    model.channel_lin1.register_forward_hook(lambda *_: seen.append("a part"))
    assert torch.equal(model(x), expected) and seen[2:] == ["a part", "head"] and len(calls) == 1
    for change, reason in (
        (lambda m: setattr(m, "token_norm", nn.RMSNorm(C)), "token_norm is RMSNorm"),
        (lambda m: setattr(m, "channel_lin2", nn.Identity()), "channel has torch.nn.modules.linear.Identity"),
        (lambda m: setattr(m, "more", nn.Identity()), "its submodules or parameters are not those of a _MLPMixer"),
    ):
        model = mixer()
        change(model)
        assert reason in fuse_(model).left[0].detail


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_one_token_has_no_hidden_units() -> None:
    assert fuse_(mixer(tokens=1)).left[0].detail == "its token mixing has no hidden units"


def test_freezing() -> None:
    model, x = mixer().eval(), torch.randn(2, S, C)
    with torch.no_grad():
        expected = model(x)
        fuse_(model, backend="triton")
        assert len(freeze_(model).frozen) == 1
        torch.testing.assert_close(model(x), expected)
