"""The table of all systems: what each one is, where it lives, and what its experiment has to show.

``python -m experiments.catalog --write-readme`` puts the table into README.md, ``--write-results`` collects the newest
``default`` runs into experiments/RESULTS.md, leaving out those whose command line changed something in the preset.
"""

import argparse
import dataclasses
import importlib
import pathlib
from typing import Literal

from experiments import claims

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- systems:begin -->", "<!-- systems:end -->"


@dataclasses.dataclass(frozen=True)
class System:
    """One published method: ``python -m experiments.<name>`` tests ``claim``.

    ``paper`` is an arXiv number; ``home`` the file or package, from the repository root, where reading starts;
    ``state`` is "ready" once that home and the experiment exist, "planned" before.
    """

    name: str
    title: str
    paper: str
    home: str
    claim: str
    state: Literal["planned", "ready"] = "planned"

    @property
    def experiment(self) -> str:
        return f"experiments/{self.name}.py"


CATALOG: tuple[System, ...] = (
    # Update rules
    System(
        name="sophia_gpt2",
        title="Sophia",
        paper="2305.14342",
        home="jaxskip/optim/sophia.py",
        claim="Sophia takes the same number of steps (within 1) on quadratics of condition number 10 to 10 million, "
        "where gradient descent slows down and Adam does not; on a tiny language model Sophia-G trains and its share "
        "of unclipped coordinates rises, but beating AdamW there is not claimed.",
        state="ready",
    ),
    System(
        name="diffgrad",
        title="diffGrad",
        paper="1909.11015",
        home="jaxskip/optim/diffgrad.py",
        claim="On digits the friction coefficient settles near 0.5, so diffGrad matches Adam at half the learning rate "
        "within 0.5 points plus one standard error; on the paper's one-dimensional function the two end in different "
        "minima.",
        state="ready",
    ),
    System(
        name="fira",
        title="Fira",
        paper="2410.01623",
        home="jaxskip/optim/fira.py",
        claim="At rank 4 and equal learning rate Fira's training loss is at most half of GaLore's on every seed, from "
        "an optimizer state of the same low-rank size plus one scalar a matrix.",
        state="ready",
    ),
    System(
        name="coordinate_clipping",
        title="Coordinate-wise clipping and directional sharpness",
        paper="2306.00204",
        home="jaxskip/optim/coordinate_clipping.py",
        claim="Clipping the largest 10 % of gradient coordinates cuts the directional sharpness of SGD's step below "
        "0.7 of its value, Adam's step lies below 0.5, and clipping Adam's first moment lowers it further.",
        state="ready",
    ),
    System(
        name="perpgrad_stablemax",
        title="PerpGrad and StableMax",
        paper="2501.04697",
        home="jaxskip/optim/perpgrad.py",
        claim="Without weight decay AdamW memorises modular addition and stays at 5 % test accuracy or less while its "
        "softmax collapses in bfloat16; with gradients made orthogonal to the weights it reaches 90 % on every seed.",
        state="ready",
    ),
    System(
        name="langevin_averaging",
        title="Langevin dynamics with weight averaging",
        paper="2603.06028",
        home="jaxskip/optim/langevin_averaging.py",
        claim="In tensor PCA the time average of a Langevin chain overlaps the planted direction by at least 0.90 "
        "while the chain itself stays near the equator, and fails (at most 0.7) when the signal is too weak.",
        state="ready",
    ),
    # Several gradients into one
    System(
        name="gcond",
        title="GCond",
        paper="2509.07252",
        home="jaxskip/multitask/gcond.py",
        claim="GCond reaches 5 % lower validation loss than summed losses, the stochastic mode comes within 4 % of the "
        "sequential one for half the backward passes, and where no gradients conflict the gain equals that of plain "
        "momentum on the accumulated sum.",
    ),
    System(
        name="sam_gs",
        title="SAM-GS",
        paper="2506.06130",
        home="jaxskip/multitask/sam_gs.py",
        claim="From all 7 starts of the two-task toy problem SAM-GS ends near the optimum (sum at most -29.5), while "
        "Adam on the summed losses stays above 0 from at least 3.",
    ),
    System(
        name="glad",
        title="GLAD",
        paper="2507.13089",
        home="jaxskip/multitask/glad.py",
        claim="Plain LoRA tuning on few shots loses accuracy on novel classes; steering its gradient by the "
        "sharpness-aware one ends at 0.75 of its sharpness or less, with a positive but small gain on novel classes. "
        "The paper's exact rule is unpublished: this is a reconstruction.",
    ),
    # Objectives
    System(
        name="cut_cross_entropy",
        title="Cut Cross-Entropy",
        paper="2411.09009",
        home="pallas_kernels/linear_cross_entropy",
        claim="Loss and gradient agree with materialised logits within 1e-5 in less than 5 % of their temporary "
        "memory, and sorting the vocabulary makes the filter skip more blocks.",
        state="ready",
    ),
    System(
        name="basic_scaling",
        title="BASIC",
        paper="2111.10050",
        home="jaxskip/losses/contrastive.py",
        claim="A contrastive batch cut into 16 micro-batches gives the uncut loss curve within 1e-4, and from 8 to 512 "
        "pairs a batch the generalisation gap shrinks by at least 1 nat at equal samples.",
    ),
    # Building blocks
    System(
        name="flashkat",
        title="FlashKAT",
        paper="2505.13813",
        home="pallas_kernels/group_rational",
        claim="GR-KAN layers reach less than 0.2 of a GELU network's training loss on digits at test accuracy within "
        "1 point, and the blocked backward pass is faster than scatter-adding each element's coefficient gradients.",
        state="ready",
    ),
    System(
        name="hourglass_mlp",
        title="Hourglass MLP",
        paper="2510.01796",
        home="jaxskip/nn/hourglass.py",
        claim="At about equal trainable parameters wide-narrow-wide residual blocks generate digits at least 1 dB "
        "better than narrow-wide-narrow ones, and freezing the random input lift costs at most 0.3 dB.",
    ),
    System(
        name="shallow_parallel",
        title="Shallow parallel networks",
        paper="2309.08414",
        home="jaxskip/nn/residual_stack.py",
        claim="Summing residual layers in parallel instead of in sequence keeps validation loss within 15 % and "
        "accuracy within 2.5 points, and trains to lower loss than 32 unscaled layers in sequence.",
    ),
    System(
        name="ghost_batch_norm",
        title="Ghost batch normalisation and regime adaptation",
        paper="1705.08741",
        home="jaxskip/nn/ghost_batch_norm.py",
        claim="A batch of 1024 loses 2 points to a batch of 32; a square-root learning rate and then ghost batch norm "
        "each win back at least 0.3 points, and training for equally many updates closes the gap to 1 point.",
    ),
    System(
        name="tract",
        title="TrAct",
        paper="2410.23970",
        home="jaxskip/nn/tract.py",
        claim="On digits of varied contrast a TrAct first layer cuts the training loss to 0.85 of the plain layer's at "
        "that one's best learning rate, and to 0.4 at twice that rate; very small rates show no gain.",
    ),
    # Language models that skip work
    System(
        name="unified_layer_skipping",
        title="Unified Layer Skipping",
        paper="2404.06954",
        home="jaxskip/skipping/unified_layer_skipping.py",
        claim="Skipping half of the layers costs more than 0.15 nats untrained, fine-tuning recovers at least 70 % of "
        "it, and evenly spaced layers come within 0.05 nats of the best pattern tried.",
        state="ready",
    ),
    System(
        name="first_router",
        title="FiRST",
        paper="2410.12513",
        home="jaxskip/skipping/first_router.py",
        claim="A stronger penalty makes the routers keep fewer layers at a higher loss, always below the worst fixed "
        "set of that size; the distance to the best fixed set is reported, a win over it is not claimed.",
        state="ready",
    ),
    System(
        name="ffn_skipllm",
        title="FFN-SkipLLM",
        paper="2404.03865",
        home="jaxskip/skipping/ffn_skipllm.py",
        claim="Skipping more than 7 % of the feed-forward blocks keeps perplexity below 1.45 of the full model's, and "
        "skipping already during the warm-up tokens raises it by more than a fifth.",
        state="ready",
    ),
    System(
        name="lora_drop",
        title="LoRA-Drop",
        paper="2601.02569",
        home="jaxskip/skipping/lora_drop.py",
        claim="Reusing a layer's stale state without training ruins perplexity (over 10 times the full model's); "
        "trained low-rank corrections win back more than 0.5 nats. Whether reuse beats skipping the layer is printed.",
        state="ready",
    ),
    System(
        name="void_lac",
        title="LAC (Void in Language Models)",
        paper="2505.14467",
        home="jaxskip/skipping/void_lac.py",
        claim="The paper's readout (the state after the last active layer) gives 80 to 88 % of tokens exactly the full "
        "model's logits at threshold 0.8; really skipping the void layers at 0.1 costs over 3 times its perplexity.",
        state="ready",
    ),
    System(
        name="modes",
        title="MoDES",
        paper="2511.15690",
        home="jaxskip/skipping/modes.py",
        claim="At 50 % and 70 % of experts skipped, layer importance plus separate text and vision thresholds stays "
        "closer to the full model (KL) than either without the other.",
    ),
    System(
        name="visual_token_redundancy",
        title="Visual-token pruning in diffusion language models",
        paper="2511.15098",
        home="jaxskip/skipping/visual_token_redundancy.py",
        claim="Keeping 25 % of the visual tokens costs more than half of the accuracy from the first denoising step "
        "on but less than a tenth from a late one; last-layer skipping is nearly free, first-layer skipping is not.",
    ),
    # Distributed training
    System(
        name="skippipe",
        title="SkipPipe",
        paper="2502.19913",
        home="jaxskip/pipeline",
        claim="A model trained on random 4 of 6 stages loses at most 15 % of perplexity when run on 3, a fully trained "
        "one at least 40 %; the price, at most 0.30 nats on the full path, is reported. The published schedules take "
        "their published time within 2 % in simulation, and a planner finds as good a one within 5 s.",
        state="ready",
    ),
    System(
        name="gradient_coding",
        title="Sequential gradient coding",
        paper="2211.13802",
        home="jaxskip/coding",
        claim="Under bursty stragglers and compute-bound rounds M-SGC finishes before SR-SGC, that before plain "
        "gradient coding, and that before no coding; with cheap compute the order changes, which is reported. Decoded "
        "gradients train two networks as if nobody had been late.",
        state="ready",
    ),
    # Training schemes
    System(
        name="adadagrad",
        title="AdAdaGrad",
        paper="2402.11215",
        home="jaxskip/training/adaptive_batch.py",
        claim="Growing the batch by the norm test needs at most 3 % of the steps of batch 8 at equal samples, with "
        "test accuracy within 3 points of it and no worse than batch 1024.",
        state="ready",
    ),
    System(
        name="gradient_boosted_training",
        title="GBNN",
        paper="1909.12098",
        home="jaxskip/training/boosting.py",
        claim="A hidden layer boosted unit by unit comes within 1 point of jointly trained networks and keeps its "
        "accuracy within 2 points on its first quarter of units, where truncating a jointly trained one loses 10.",
    ),
    System(
        name="pa_da",
        title="PA&DA",
        paper="2302.14772",
        home="jaxskip/training/pa_da.py",
        claim="After 40 epochs, drawing examples by their logit-gradient norm cuts a supernet's gradient variance "
        "below a quarter of uniform sampling's, where the exact norms mark the optimum; a better ranking of networks "
        "is not claimed.",
    ),
    # Diffusion and flows
    System(
        name="flowchef_digits",
        title="FlowChef",
        paper="2412.00100",
        home="jaxskip/diffusion/flowchef.py",
        claim="Steering a rectified flow without back-propagation through it inpaints, upscales and deblurs digits "
        "better than the degraded input in at most half of full back-propagation's time; full back-propagation is "
        "better on large holes.",
    ),
    System(
        name="skip_tuning_digits",
        title="Skip-Tuning",
        paper="2402.15170",
        home="jaxskip/diffusion/skip_tuning.py",
        claim="Scaling a UNet's skip connections down raises its pixel denoising error monotonically, as the paper "
        "says; the better samples that it finds at full scale are not expected at this size, and the sweep is printed.",
    ),
    # Vision
    System(
        name="cutmix_digits",
        title="CutMix",
        paper="1905.04899",
        home="jaxskip/vision/cutmix.py",
        claim="On 200 training digits CutMix is no worse on clean images and at least 8 points better when the centre "
        "is blanked.",
    ),
    System(
        name="layer_masking_digits",
        title="Layer masking",
        paper="2211.14646",
        home="jaxskip/vision/layer_masking.py",
        claim="With random patches removed, layer masking keeps at least 5 points more mean accuracy than the best "
        "fill colour, and neighbour padding is what brings it.",
    ),
    System(
        name="normgrad_pointing",
        title="NormGrad",
        paper="2004.02866",
        home="jaxskip/vision/normgrad.py",
        claim="NormGrad points at the digit in at least 95 % of the pictures from every layer, where the gradient at "
        "the last layer fails; only its selective form tells two digits apart.",
    ),
    System(
        name="reflection_patches",
        title="Interactive reflection removal",
        paper="2406.01555",
        home="jaxskip/vision/reflection_removal.py",
        claim="The guided network's output is closer to the clean picture than the input is; that the guidance itself "
        "helps is measured against unguided, shuffled and swapped masks. No pilot has shown either at this size.",
    ),
    System(
        name="unsegment_shapes",
        title="UAD (Unsegment Anything)",
        paper="2404.02585",
        home="jaxskip/vision/unsegment_anything.py",
        claim="At 32/255 the deformation attack transfers to an unseen segmenter better than untargeted, other-image "
        "and random perturbations, while a prompt-specific attack wins only on the network it was made for.",
    ),
    # Measurements
    System(
        name="discretisation_drift",
        title="Discretisation drift",
        paper="2310.14036",
        home="jaxskip/analysis/discretisation_drift.py",
        claim="DAL without a tuned learning rate ends at half the loss of the best stable gradient descent or less and "
        "never rises above 1.05 of the initial loss; cancelling the interaction drift makes a diverging game converge.",
    ),
    System(
        name="double_descent",
        title="The optimiser's part in double descent",
        paper="2312.03951",
        home="jaxskip/analysis/double_descent.py",
        claim="Least squares has its test-error peak where features equal examples, 100 steps of gradient descent show "
        "none, and the peak grows with the number of steps.",
    ),
    System(
        name="opposing_signals",
        title="Opposing signals at the edge of stability",
        paper="2311.04163",
        home="jaxskip/analysis/opposing_signals.py",
        claim="At learning rate 0.2 full-batch training hovers at the stability threshold (0.97 to 1.06 of it) and at "
        "0.05 stays below 0.6; in the toy model the loss spike comes from two groups with opposite signals.",
    ),
)


def markdown_table() -> str:
    """The table of the README."""
    rows = [
        (f"`{s.name}`", f"{s.title} ([{s.paper}](https://arxiv.org/abs/{s.paper}))", f"`{s.home}`", s.state)
        for s in CATALOG
    ]
    return claims.format_table(("system", "paper", "where", "state"), rows)


def with_systems_table(readme: str) -> str:
    """``readme`` with the current table between its two markers. Raises ValueError where a marker is missing."""
    before, found_begin, rest = readme.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not (found_begin and found_end):
        raise ValueError(f"README.md needs the line {BEGIN} and, below it, the line {END}")
    return f"{before}{BEGIN}\n{markdown_table()}\n{END}{after}"


def last_report(name: str, runs: pathlib.Path, preset: str | None = None) -> claims.Report | None:
    """The newest report of a system, or None. Raises ValueError for an unreadable one.

    With a preset, only runs with exactly its present configuration count, not one for which a flag changed it.
    """
    folders = [path.parent for path in (runs / name).glob(f"*/{claims.REPORT_FILE}")]
    reports = [report for report in map(claims.Report.load, folders) if preset in (None, report.preset)]
    if preset is not None and reports:
        wanted = claims.to_json(importlib.import_module(f"experiments.{name}").PRESETS[preset])
        reports = [report for report in reports if claims.to_json(report.config) == wanted]
    return max(reports, key=lambda report: report.created, default=None)


def _write_results(runs: pathlib.Path) -> None:
    ready = [system.name for system in CATALOG if system.state == "ready"]
    found = {name: last_report(name, runs, preset="default") for name in ready}
    reports = [report for report in found.values() if report is not None]
    if not reports:
        raise ValueError(f"no default run of any system has a report under {runs}")
    claims.write_atomic(ROOT / "experiments" / "RESULTS.md", claims.results_markdown(reports))
    missing = [name for name in ready if found[name] is None]
    print(
        f"experiments/RESULTS.md: {len(reports)} of {len(CATALOG)} systems; "
        f"ready but not run with the default configuration: {missing or 'none'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.catalog", description="Prints or writes the table.")
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    parser.add_argument("--write-results", action="store_true", help="collect the newest default runs in RESULTS.md")
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs"), help="where the runs are")
    arguments = parser.parse_args()
    try:
        if arguments.write_readme:
            readme = ROOT / "README.md"
            claims.write_atomic(readme, with_systems_table(readme.read_text(encoding="utf-8")))
        if arguments.write_results:
            _write_results(arguments.runs)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    if not (arguments.write_readme or arguments.write_results):
        print(markdown_table())


if __name__ == "__main__":
    main()
