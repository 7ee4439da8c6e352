"""Vector quantisers: continuous frames in, discrete codes (and, where learned, their vectors) out."""

import torch
from torch import nn
from transformers import initialization as init


class RandomProjectionQuantizer(nn.Module):
    """Codes of the nearest random codeword after a random projection; nothing in it is trained.

    Args:
        input_dim: channels of the frames.
        codebook_dim: channels after the projection.
        codebook_size: codewords in a codebook.
        num_codebooks: independent projections and codebooks.
        seed: draws projections (Xavier uniform) and codewords (normal, unit length).

    Source: Chiu et al. 2022, arXiv 2202.01855, section 3.1; several codebooks: Zhang et al. 2023, arXiv 2303.01037.
    """

    def __init__(self, input_dim: int, codebook_dim: int, codebook_size: int, num_codebooks: int, seed: int = 0):
        super().__init__()
        self.seed = seed
        self.register_buffer("projection", torch.empty(num_codebooks, input_dim, codebook_dim))
        self.register_buffer("codebook", torch.empty(num_codebooks, codebook_dim, codebook_size))

    def init_weights(self):
        generator = torch.Generator().manual_seed(self.seed)
        num_codebooks, input_dim, codebook_dim = self.projection.shape
        limit = (6 / (input_dim + codebook_dim)) ** 0.5
        uniform = torch.rand(self.projection.shape, generator=generator)
        codewords = torch.randn(self.codebook.shape, generator=generator)
        init.copy_(self.projection, (2 * uniform - 1) * limit)
        init.copy_(self.codebook, nn.functional.normalize(codewords, dim=1))

    @torch.no_grad()
    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """(M, input_dim) → codes (M, num_codebooks). Equal to the argmin of the distance between unit vectors."""
        with torch.autocast(frames.device.type, enabled=False):
            projected = torch.einsum("mi,gid->gmd", frames.float(), self.projection.float())
            similarity = torch.bmm(projected, self.codebook.float())  # (G, M, D) x (G, D, V) -> (G, M, V)
            return similarity.argmax(-1).T


class GumbelVectorQuantizer(nn.Module):
    """Product quantiser with straight-through Gumbel softmax.

    Args:
        input_dim: channels of the frames.
        codevector_dim: channels of a quantised frame, all groups together.
        codebook_size: codewords in a group (V).
        num_codebooks: groups (G).

    Source: Baevski et al. 2020, arXiv 2006.11477, section 2 and eq. 1.
    """

    def __init__(self, input_dim: int, codevector_dim: int, codebook_size: int, num_codebooks: int):
        super().__init__()
        if codevector_dim % num_codebooks:
            raise ValueError(f"codevector_dim ({codevector_dim}) must be a multiple of num_codebooks ({num_codebooks})")
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.codevectors = nn.Parameter(torch.empty(num_codebooks, codebook_size, codevector_dim // num_codebooks))
        self.weight_proj = nn.Linear(input_dim, num_codebooks * codebook_size)

    def init_weights(self):
        init.uniform_(self.codevectors)
        init.normal_(self.weight_proj.weight, mean=0.0, std=1.0)
        init.zeros_(self.weight_proj.bias)

    def forward(self, frames: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantise frames (M, input_dim).

        Returns:
            codevectors (M, codevector_dim); probabilities (M, G, V), the softmax without noise and temperature, with
            gradient; codes (M, G). In training the code is drawn with Gumbel noise, otherwise it is the likeliest.
        """
        logits = self.weight_proj(frames).float().view(-1, self.num_codebooks, self.codebook_size)
        if self.training:
            choice = nn.functional.gumbel_softmax(logits, tau=temperature, hard=True)
        else:
            choice = nn.functional.one_hot(logits.argmax(-1), self.codebook_size).to(logits.dtype)
        codevectors = torch.einsum("mgv,gvd->mgd", choice, self.codevectors.float()).flatten(
            1
        )  # (M, G, D) -> (M, G * D)
        return codevectors, logits.softmax(-1), choice.argmax(-1)


def code_histogram(codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """How often each code occurs: codes (M, G) → counts (G, codebook_size)."""
    num_codebooks = codes.shape[1]
    offsets = torch.arange(num_codebooks, device=codes.device) * codebook_size
    positions = (codes + offsets).flatten()
    counts = torch.zeros(num_codebooks * codebook_size, dtype=torch.long, device=codes.device)
    return counts.index_add_(0, positions, torch.ones_like(positions)).view(num_codebooks, -1)


def perplexity(histogram: torch.Tensor) -> torch.Tensor:
    """Effective number of codes in use, exp(entropy), of counts or probabilities (..., V)."""
    probabilities = histogram / histogram.sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.exp(torch.special.entr(probabilities).sum(-1))


def code_usage(histogram: torch.Tensor) -> dict[str, float]:
    """Perplexity and number of codes in use, of counts (G, V), averaged over codebooks."""
    return {
        "code_perplexity": perplexity(histogram.float()).mean().item(),
        "codes_used": (histogram > 0).sum(-1).float().mean().item(),
    }
