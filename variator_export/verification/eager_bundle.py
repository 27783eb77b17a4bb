"""A bundle in eager PyTorch: the backbone that the bundle was built from, with the bundle's plugins."""

import dataclasses
import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import CALIBRATION, Variant
from variator_export.bundle.origin import recorded_origin
from variator_export.core.environment import require_export
from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision
from variator_export.core.progress import Progress
from variator_export.generation.search import StepDecoder
from variator_export.model.plugin_file import load_variant_plugin
from variator_export.model.source import is_plain_folder, resolve_source
from variator_export.sessions import Bundle
from variator_export.verification.cases import REAL_TEXT, Case, make_cases
from variator_export.verification.consistency import check_backbone
from variator_export.verification.generation.checks import ALONE, FORCED, GREEDY
from variator_export.verification.generation.decoder import DecoderRun, run_of_bundle
from variator_export.verification.judging.error_budget import quantization_share
from variator_export.verification.judging.expected import Expected
from variator_export.verification.judging.judge import REFERENCE, Finding
from variator_export.verification.reference import eager_reference
from variator_export.verification.runs import Runs
from variator_export.verification.stored_recipe import recipe_of

if TYPE_CHECKING:
    from variator_export.model.backbone import Backbone
    from variator_export.verification.bisection.bisect import (
        Bisection,
        BisectSubject,
        DecoderCase,
        TracedModel,
    )
    from variator_export.verification.generation.checks import GeneratingVariant, GenerationFindings
    from variator_export.verification.quantized.losses import QuantizationLoss


# Number of shapes that `verify` draws for a seed.
_DRAWN = 12
# The checks that compare numbers with eager PyTorch.
_OF_NUMBERS = (REFERENCE, FORCED)


def backbone_of_bundle(bundle: BundleFiles) -> str:
    """The source of a bundle's backbone on this machine.

    A folder is looked for where the build found it, and then where the manifest says, relative to the current
    folder. It is never taken for a repository of the hub.

    Raises:
        UserError: The bundle was built from a folder that is in neither place.
    """
    source = bundle.manifest.backbone.source
    if not is_plain_folder(source):
        return source
    recorded = recorded_origin(bundle.path)
    for folder in (recorded, Path(source).expanduser()):
        if folder is not None and folder.is_dir():
            return str(folder.resolve())
    raise UserError(
        f"The bundle was built from the folder {recorded or source}, which is not on this machine.",
        "Copy it here, and give its new place with --backbone.",
    )


def load_bundle_backbone(
    bundle: Bundle, source: str | None, without: str, precision: str | None = None
) -> "Backbone":
    """Load a bundle's backbone. Requires torch and transformers.

    Args:
        bundle: The bundle.
        source: The backbone's location. None means its location when the bundle was built.
        without: The option that avoids the need for the backbone, for messages.
        precision: The precision to load it in. None means the bundle's.

    Raises:
        UserError: The backbone is missing, or has different weights.
    """
    require_export()
    from variator_export.model.backbone_info import read_backbone_info
    from variator_export.model.in_precision import load_in_precision

    entry = bundle.manifest.backbone
    try:
        found = resolve_source(source or backbone_of_bundle(bundle))
    except UserError as error:
        raise UserError(
            f"The backbone was not found: {error.message}",
            f"Pass it with --backbone, or do without it: {without}",
        ) from error
    if found.weights_sha256 != entry.weights_sha256:
        raise UserError(
            f"The weights of {found.name} are not those that the bundle was built from.",
            f"Pass the bundle's own backbone with --backbone, or do without it: {without}",
        )
    info = read_backbone_info(
        found, entry.architecture, label_words=entry.label_words, decoder_prompt=entry.decoder_prompt
    )
    wanted = precision or bundle.manifest.precision
    kept = recipe_of(bundle).quantization.float32_modules
    calibration = None
    if find_precision(wanted).needs_calibration:
        from variator_export.model.quantization.calibration import load_calibration

        calibration = load_calibration(bundle.file(CALIBRATION))
    return load_in_precision(info, bundle.text_encoder().pad_token_id, wanted, kept, calibration)


class EagerBundle:
    """The variants of a bundle in eager PyTorch.

    Args:
        bundle: The bundle.
        source: The backbone's location. None means its location when the bundle was built.
        shapes: Additional shapes (batch_size, sequence_length) that the references cover.
        seed: Seed of random tokens and of shapes that are drawn in addition. None means the recipe's seed,
            and no drawn shape.
    """

    def __init__(
        self, bundle: Bundle, source: str | None, shapes: Sequence[tuple[int, int]], seed: int | None = None
    ) -> None:
        self._bundle = bundle
        self._shapes = shapes
        self._seed = seed
        self._backbone: Backbone = load_bundle_backbone(bundle, source, "--reference stored")
        check_backbone(bundle, self._backbone)
        import torch  # only now: the line before has checked that it is installed

        self._exact = self._backbone.to_dtype(torch.float64)
        self._quantizes = find_precision(bundle.manifest.precision).quantizes
        # The model before its quantisation; only for precisions that quantise.
        self._float32 = (
            load_bundle_backbone(bundle, source, "--reference stored", "float32")
            if self._quantizes
            else self._backbone
        )

    def reference(self, variant: Variant, progress: Progress) -> list[Expected]:
        """Compute the reference for all cases of a variant."""
        from variator_export.engines.eager import EagerModel

        cases, precision = self._cases(variant), self._bundle.manifest.precision
        with progress.bar(f"eager {variant.name}", len(cases)) as advance:
            exact = EagerModel.of_variant(self._exact, self._bundle, variant)
            share = quantization_share(precision)
            yardstick = self._backbone if share is None else self._float32
            other = EagerModel.of_variant(yardstick, self._bundle, variant)
            return eager_reference(exact, other, cases, precision, advance, share=share)

    def quantization(
        self, variant: Variant, graphs: Mapping[str, Mapping[str, np.ndarray]], progress: Progress
    ) -> "tuple[list[Finding], list[QuantizationLoss]]":
        """Check a quantised variant: its graphs given their own rounding, and its loss against float32.

        Args:
            variant: The variant.
            graphs: Additional inputs of each of its graphs, by file.
            progress: Receives progress reports.

        Returns:
            The findings and the losses; both are empty for a precision that does not quantise.
        """
        if not self._quantizes:
            return [], []
        from variator_export.engines.eager import EagerModel
        from variator_export.verification.quantized.variant import QuantizedVariant, check_quantization

        bundle = self._bundle
        exact, rounded, float32 = (
            EagerModel.of_variant(backbone, bundle, variant)
            for backbone in (self._exact, self._backbone, self._float32)
        )
        subject = QuantizedVariant(
            name=variant.name,
            folder=bundle.path,
            # Inside branches, rounding cannot be given.
            graphs={n: extra for n, extra in graphs.items() if n != bundle.manifest.any_assembly_graph},
            precision=bundle.manifest.precision,
            exact=exact,
            rounded=rounded,
            float32=float32,
            token_outputs=bundle.manifest.backbone.token_outputs,
            limits=recipe_of(bundle).quantization,
        )
        with progress.bar(f"rounding {variant.name}", len(graphs)) as advance:
            return check_quantization(subject, self._cases(variant), advance)

    def generation(
        self, variant: Variant, decoder: DecoderRun[StepDecoder], progress: Progress
    ) -> "GenerationFindings":
        """Check the decoder with a variant's encoder: scores along given tokens, and greedy search."""
        from variator_export.verification.generation.checks import check_generation, generation_cases

        # A graph takes every shape; an engine is checked at those that it was built for.
        shapes = self._shapes if decoder.supports is not None else ()
        cases = generation_cases(self._cases(variant), shapes)
        with progress.bar(f"generate {variant.name}", 1) as advance:
            found = check_generation(self._generating(variant, decoder), cases, self._seed or 0)
            advance()
        return found

    def _generating(self, variant: Variant, decoder: DecoderRun[StepDecoder]) -> "GeneratingVariant":
        from variator_export.engines.eager import EagerModel
        from variator_export.generation.settings import read_settings
        from variator_export.verification.generation.checks import GeneratingVariant

        bundle, size = self._bundle, self._bundle.manifest.backbone.decoder_size
        assert size is not None
        return GeneratingVariant(
            decoder=decoder,
            ratio=variant.ratio,
            vocab_size=size.vocab_size,
            settings=read_settings(bundle.path),
            exact=EagerModel.of_variant(self._exact, bundle, variant),
            same_precision=EagerModel.of_variant(self._backbone, bundle, variant),
            precision=bundle.manifest.precision,
        )

    def bisect(
        self, variant: Variant, findings: Sequence[Finding], runs: Runs, folder: Path, progress: Progress
    ) -> "list[Bisection]":
        """Bisect each failed graph or engine of a variant. Errors during a bisection are only reported.

        Args:
            variant: The variant.
            findings: The findings for everything that ran the variant.
            runs: The object that runs the variant's graphs or engines.
            folder: The folder for reproductions.
            progress: Receives progress reports and notes.
        """
        from variator_export.verification.bisection.bisect import EagerDecoder, bisect
        from variator_export.verification.bisection.reproduction import write_reproduction

        whole = self._bisected(variant)
        decoder = EagerDecoder(whole[0]), EagerDecoder(whole[1])
        cases = {case.name: case for case in self._cases(variant)}
        found = []
        for file in dict.fromkeys(finding.question.graph for finding in findings):
            of_file = [f for f in findings if f.question.graph == file and f.ran]
            if all(finding.passed for finding in of_file):
                continue
            failed: Case | DecoderCase = _case_to_bisect(of_file, cases, variant.ratio)
            outputs = [
                f for f in of_file if f.question.case == failed.name and f.question.check in _OF_NUMBERS
            ]
            doing = "bisected"
            try:
                is_decoder = any(f.question.check in (FORCED, ALONE, GREEDY) for f in of_file)
                exact, rounded = decoder if is_decoder else whole
                case = self._decoder_case(variant, cases[failed.name], runs) if is_decoder else failed
                target = self._with_names(variant, runs.bisect_target(variant, file, progress))
                result = bisect(target, exact, rounded, case, outputs, self._bundle.manifest.precision)
                found.append(result)
                if result.first is not None:
                    doing = "reproduced in a folder"
                    where = folder / variant.name / PurePosixPath(file).name
                    write_reproduction(target, exact, case, result.first, where)
            except Exception as error:  # an error here must not discard the earlier findings
                words = traceback.format_exc()
                if isinstance(error, UserError | OSError):
                    words = error.message if isinstance(error, UserError) else str(error)
                progress.note(f"{file} could not be {doing}: {words}")
        return found

    def _bisected(self, variant: Variant) -> "tuple[TracedModel, TracedModel]":
        """A variant in float64 and in its precision, with the modules that graphs were traced from."""
        from variator_export.engines.eager import EagerModel

        if variant.assembly is None:
            plugin = load_variant_plugin(self._bundle, variant)
            # With its plugin of zeros, ratio 1 has the same modules that its graph was traced from.
            return EagerModel(self._exact, plugin), EagerModel(self._backbone, plugin)
        from variator_export.model.modular.variant import traced_form
        from variator_export.verification.bisection.assembled import AssembledRunner, eager_names

        files, names = self._bundle.variant_files(variant), eager_names(self._backbone.info, variant.assembly)
        exact, rounded = (EagerModel(b, traced_form(b, files)) for b in (self._exact, self._backbone))
        return AssembledRunner(exact, names), AssembledRunner(rounded, names)

    def _with_names(self, variant: Variant, target: "BisectSubject") -> "BisectSubject":
        """Name the layers in a graph of an assembly as `_bisected` names them."""
        if variant.assembly is None or target.name == self._bundle.manifest.any_assembly_graph:
            return target
        from variator_export.model.modular.files import load_module_config
        from variator_export.verification.bisection.assembled import graph_names, rename_layers

        files = self._bundle.variant_files(variant)
        configs = [load_module_config(files.root / folder) for folder in files.modules]
        names = graph_names(self._backbone.info, variant.assembly, configs)
        return dataclasses.replace(target, load=lambda: rename_layers(target.load(), names))

    def _decoder_case(self, variant: Variant, case: Case, runs: Runs) -> "DecoderCase":
        """The inputs of the decoder at the step that is furthest off, as the graphs get them."""
        from variator_export.verification.bisection.bisect import DecoderCase
        from variator_export.verification.generation.checks import worst_step

        tokens = worst_step(self._generating(variant, runs.decoder(variant)), case, self._seed or 0)
        call = run_of_bundle(self._bundle, variant).start(case.inputs, 1)
        for step in tokens.T[:-1]:
            call.step(step)
        return DecoderCase(f"{case.name}, token {tokens.shape[1]}", call.inputs(tokens[:, -1]))

    def _cases(self, variant: Variant) -> list[Case]:
        manifest, recipe = self._bundle.manifest, recipe_of(self._bundle)
        return make_cases(
            self._bundle.text_encoder(),
            manifest.backbone.inputs,
            ratio=variant.ratio,
            vocab_size=self._backbone.info.config.vocab_size,
            max_length=manifest.backbone.max_length,
            texts=recipe.verify.texts,
            shapes=self._shapes,
            seed=recipe.verify.seed if self._seed is None else self._seed,
            drawn=0 if self._seed is None else _DRAWN,
        )


def _case_to_bisect(findings: Sequence[Finding], cases: Mapping[str, Case], ratio: int) -> Case:
    """Return the smallest failing case, because every module's values are held twice, in float64.

    Size is the last criterion. Cases with wrong numbers come first, because a module's values reveal little
    about rows that depend on each other. Cases without rows of padding alone come next, because runtimes
    return arbitrary values for such rows. Then come cases of whole windows: there a graph of another ratio
    fails at its windows and not at its padding.
    """
    failed = [finding for finding in findings if not finding.passed]
    wrong = [finding for finding in failed if finding.question.check in _OF_NUMBERS] or failed
    # A finding on all cases has no case of its own.
    names = [f.question.case for f in wrong if f.question.case in cases] or [REAL_TEXT]
    chosen = [cases[name] for name in names]

    def severity(case: Case) -> tuple[bool, bool, int]:
        return not case.judged_rows.all(), case.shape[1] % ratio != 0, math.prod(case.shape)

    return min(chosen, key=severity)
