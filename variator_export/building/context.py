"""State shared by the steps of one build. Everything slow is loaded once, when it is first needed."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from variator_export.building.staging import StagedBundle
from variator_export.building.variant_plan import VariantPlan
from variator_export.bundle.branches import Branch, projection_outputs, switches
from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.manifest import BACKBONE_WEIGHTS, CALIBRATION
from variator_export.bundle.parts import graph_name
from variator_export.bundle.variant import decoder_name
from variator_export.bundle.variant_files import (
    MODULE_CONFIG_NAME,
    MODULE_TENSORS_NAME,
    QUANTIZED_MODULES_NAME,
    VariantFiles,
)
from variator_export.core.encoder_size import DecoderSize
from variator_export.core.environment import GRAPH_DISTRIBUTIONS, platform_tag, require_export, versions
from variator_export.core.hashing import code_digest, sha256_file
from variator_export.core.json_file import read_json_object
from variator_export.core.parts import DECODER, ENCODER, MODEL
from variator_export.core.precision import FLOAT32, find_precision
from variator_export.generation.settings import SETTINGS_NAME
from variator_export.model.methods import METHODS
from variator_export.model.plugin_file import PluginHost, load_plugin_config
from variator_export.model.plugin_layout import PluginConfig
from variator_export.model.source import BackboneSource, stored_dtypes
from variator_export.recipe.recipe import Recipe
from variator_export.text.settings import TEXT_SETTINGS_FILES
from variator_export.text.tokenizer import TOKENIZER_FILES, TextEncoder

if TYPE_CHECKING:
    from variator_export.engines.base import Arrays
    from variator_export.engines.eager import EagerModel
    from variator_export.model.backbone import Backbone
    from variator_export.model.backbone_info import BackboneInfo
    from variator_export.model.quantization.calibration import Calibration

# The source files that determine the result of tracing, binding, verification and plugin initialisation.
TRACED_BY = ("graph", "model", "core/assembly.py", "core/axes.py", "core/precision.py")
BOUND_BY = (
    "graph",
    "model/methods",
    "model/modular",
    "model/plugin_file.py",
    "model/plugin_layout.py",
    "core/assembly.py",
    "core/axes.py",
)
VERIFIED_BY = (
    "verification",
    "engines/base.py",
    "engines/eager.py",
    "engines/onnxruntime",
    "graph/widen.py",
    "model",
    "text",
    "bundle/branches.py",
    "core/assembly.py",
    "core/axes.py",
    "core/precision.py",
)
TEXT_CHECKED_BY = (
    "text",
    "inference.py",
    "engines/batches.py",
    "engines/onnxruntime",
    "graph/widen.py",
    "verification",
    "core/precision.py",
)
ANY_ASSEMBLY = "any-assembly"
TEXT_TO_TEXT = "text2text-generation"
INITIALISED_BY = ("model/plugin.py", "model/plugin_file.py", "model/plugin_layout.py")


class BuildContext:
    """State of one build.

    Args:
        staged: The staged bundle that the steps write to.
        recipe: The resolved recipe.
        source: The backbone's files.
    """

    def __init__(self, staged: StagedBundle, recipe: Recipe, source: BackboneSource) -> None:
        self.staged = staged
        self.recipe = recipe
        self.source = source
        # Whether the recipe names no calibration, so that the bundle's own is kept.
        self.keeps_calibration = False
        # The branches of the graph that runs every assembly; none without assemblies.
        self.branches: tuple[Branch, ...] = ()
        self.made_by: dict[str, str | None] = {
            **versions("variator-export", *GRAPH_DISTRIBUTIONS),
            "code": code_digest(*TRACED_BY),
            "platform": platform_tag(),
        }
        names = ["config.json", *TOKENIZER_FILES]
        # modules.json and the folders it names define how sentence embeddings are pooled.
        pooling = ["modules.json", *_pooling_files(source.folder)]
        copied = [*names, *TEXT_SETTINGS_FILES, *pooling, SETTINGS_NAME]
        self.backbone_files = {n: source.folder / n for n in copied if (source.folder / n).is_file()}
        decisive = [*names, *pooling]
        self.backbone_key: dict[str, Any] = {
            "weights_sha256": source.weights_sha256,
            "architecture": recipe.backbone.architecture,
            "task": recipe.backbone.task,
            **recipe.backbone.model_dump(include={"label_words", "decoder_prompt"}, exclude_defaults=True),
            "files": {n: sha256_file(p) for n in decisive if (p := source.folder / n).is_file()},
        }

    @cached_property
    def generates(self) -> bool:
        """Whether the model generates text, found by its task or its class, without torch."""
        backbone = self.recipe.backbone
        if backbone.label_words is not None:
            return False
        if backbone.task is not None:
            return backbone.task == TEXT_TO_TEXT
        name = backbone.architecture
        if name is None:
            config = read_json_object(self.source.folder / "config.json", "Restore it from its source.")
            listed = config.get("architectures")
            name = listed[0] if isinstance(listed, list) and listed else None
        return isinstance(name, str) and name.endswith("ForConditionalGeneration")

    @property
    def part(self) -> str:
        """The part of the model that plugins are in."""
        return ENCODER if self.generates else MODEL

    @property
    def any_ratio(self) -> str:
        """The graph that takes plugins as inputs."""
        return graph_name(ANY_RATIO, self.part)

    @property
    def traced(self) -> dict[str, str]:
        """The graphs that are traced, by part."""
        own = {self.part: self.any_ratio}
        return own | {DECODER: f"{DECODER}.onnx"} if self.generates else own

    def shared_graphs(self, plan: VariantPlan) -> tuple[str, ...]:
        """Return the graphs that take plugins as inputs and can run a variant."""
        own = (self.any_ratio,) if plan.assembly is None else ()
        return tuple(dict.fromkeys((*own, self.session_graph)))

    @property
    def branched(self) -> tuple[str, ...]:
        """Return the graph whose layers are branches, if there is one. Inside, rounding cannot be given."""
        return (self.session_graph,) if self.branches else ()

    @property
    def session_graph(self) -> str:
        """Return the graph that runs all variants in one session."""
        return graph_name(ANY_ASSEMBLY, self.part) if self.branches else self.any_ratio

    def graph(self, plan: VariantPlan) -> str:
        """Return a variant's own graph of the part with plugins."""
        return graph_name(plan.name, self.part)

    def decoder(self, plan: VariantPlan) -> str:
        """Return the graph of a variant's decoder, of a model that generates text."""
        name = decoder_name(plan.assembly)
        return self.traced[DECODER] if name == ANY_RATIO else graph_name(name, DECODER)

    def decoder_size(self, plan: VariantPlan) -> DecoderSize:
        """Return the sizes of a variant's decoder, of a model that generates text."""
        assert self.info.decoder_size is not None
        return self.info.decoder_size.of_assembly(plan.assembly)

    def shared_outputs(self, plan: VariantPlan, graph: str) -> dict[str, str] | None:
        """Return where a graph that takes plugins as inputs has a variant's outputs."""
        if graph not in self.branched:
            return None
        return projection_outputs(self.branches, plan.assembly, self.info.stack_layers)

    def code_fingerprint(self, *parts: str) -> dict[str, str | None]:
        """Return the versions and the digest of the code that determine a step's result."""
        return {**self.made_by, "code": code_digest(*parts)}

    @cached_property
    def info(self) -> "BackboneInfo":
        """The backbone's configuration; needs torch and transformers."""
        require_export()
        from variator_export.model.backbone_info import read_backbone_info

        backbone = self.recipe.backbone
        return read_backbone_info(
            self.source, backbone.architecture, backbone.task, backbone.label_words, backbone.decoder_prompt
        )

    @property
    def host(self) -> PluginHost:
        """The properties of the backbone that a plugin has to match."""
        info = self.info
        return PluginHost(
            name=self.source.name,
            model_type=info.spec.family.name,
            hidden_size=info.size.hidden_size,
            num_layers=info.size.num_layers,
            weights_sha256=self.source.weights_sha256,
        )

    @cached_property
    def encoder(self) -> TextEncoder:
        """The backbone's tokenizer."""
        return TextEncoder(self.source.folder)

    @cached_property
    def backbone(self) -> "Backbone":
        """The backbone with its weights, in the recipe's precision."""
        from variator_export.model.in_precision import load_in_precision

        kept, pad = self.recipe.quantization.float32_modules, self.encoder.pad_token_id
        found = load_in_precision(self.info, pad, self.recipe.precision, kept, self.calibration)
        stored = stored_dtypes(self.source.folder) - {"F32"}
        if stored and self.recipe.precision == "float32":
            self.staged.progress.note(
                f"{self.source.name} is stored in {', '.join(sorted(stored))}; the bundle is in float32, "
                "twice the size (--precision float16 or bfloat16)."
            )
        if found.left_out:
            self.staged.progress.note(
                f"left out of {self.source.name}, because {self.info.spec.name} does not have them: "
                f"{', '.join(found.left_out)}"
            )
        return found

    @property
    def quantizes(self) -> bool:
        """Whether the recipe's precision quantises the linear layers."""
        return find_precision(self.recipe.precision).quantizes

    @property
    def quantizer(self) -> "Callable[[Any], object] | None":
        """A function that quantises a transformers model in place; None if the precision does not."""
        if not self.quantizes:
            return None
        precision, kept = find_precision(self.recipe.precision), self.recipe.quantization.float32_modules
        return partial(self.info.quantize, precision=precision, kept=kept, calibration=self.calibration)

    @cached_property
    def calibration(self) -> "Calibration | None":
        """What the step `calibrate` found; None if the precision needs no calibration."""
        from variator_export.model.quantization.calibration import load_calibration

        if not find_precision(self.recipe.precision).needs_calibration:
            return None
        return load_calibration(self.staged.current(CALIBRATION))

    @cached_property
    def unquantized(self) -> "Backbone":
        """The backbone before its quantisation; the backbone itself if the precision does not quantise."""
        from variator_export.model.backbone import load_backbone

        return load_backbone(self.info, self.encoder.pad_token_id) if self.quantizes else self.backbone

    @cached_property
    def in_float32(self) -> "Backbone":
        """The backbone in float32, whatever the recipe's precision."""
        from variator_export.model.backbone import load_backbone

        if find_precision(self.recipe.precision).unquantized == FLOAT32.name:
            return self.unquantized
        return load_backbone(self.info, self.encoder.pad_token_id)

    def files(self, plan: VariantPlan) -> VariantFiles:
        """Return a variant's own files: in the staging folder; before they are copied, in the old bundle."""
        own = [*plan.module_folders, *([plan.plugin_folder] if plan.plugin_folder else [])]
        old = self.staged.old
        copied = old is None or all((self.staged.folder / name).exists() for name in own)
        root = self.staged.folder if copied or old is None else old.path
        on = None
        if self.branches:
            on = switches(self.branches, plan.assembly, plan.modules, self.info.stack_layers)
        return VariantFiles(root, plan.plugin_folder, plan.assembly, plan.module_folders, on)

    def graph_inputs(self, plan: VariantPlan, graph: str) -> "Arrays":
        """Return the inputs with which a graph that takes plugins as inputs runs a variant."""
        method, has_branches = METHODS.find(plan.method), graph in self.branched
        return method.shared_graph_inputs(self.info.size, self.files(plan), has_branches=has_branches)

    def plugin_config(self, plan: VariantPlan) -> PluginConfig:
        """Read the configuration of a variant's plugin from its current location."""
        return load_plugin_config(self.files(plan).plugin_folder)

    def eager(self, plan: VariantPlan, backbone: "Backbone | None" = None) -> "EagerModel":
        """Load a variant in eager PyTorch, on this backbone or on another copy of the backbone."""
        from variator_export.engines.eager import EagerModel

        chosen = backbone or self.backbone
        return EagerModel(chosen, METHODS.find(plan.method).eager(chosen, self.files(plan)))

    def graph_input_hashes(self, plan: VariantPlan) -> dict[str, Any]:
        """Return the hashes of all files that a variant's graph is made from or refers to."""
        sha256, plugin = self.staged.sha256, plan.plugin_folder
        return {
            "any_ratio": sha256(self.any_ratio),
            "weights": sha256(BACKBONE_WEIGHTS),
            "plugin": sha256(f"{plugin}/plugin.safetensors") if plugin else None,
            "plugin_config": sha256(f"{plugin}/plugin_config.json") if plugin else None,
            **(
                {"assembly": str(plan.assembly), "modules": self.module_hashes(plan.module_folders)}
                if plan.assembly is not None
                else {}
            ),
        }

    def module_hashes(self, folders: Sequence[str]) -> dict[str, Any]:
        """Return the hashes of all files of folders of modules."""
        names = [MODULE_CONFIG_NAME, MODULE_TENSORS_NAME]
        names += [QUANTIZED_MODULES_NAME] if self.quantizes else []
        files = [f"{folder}/{name}" for folder in folders for name in names]
        return {name: self.staged.sha256(name) for name in files}


def _pooling_files(backbone: Path) -> list[str]:
    """List the configurations that modules.json names. Its errors are reported later, when it is used."""
    try:
        modules = json.loads((backbone / "modules.json").read_text(encoding="utf-8"))
        paths = [PurePosixPath(module["path"]) for module in modules if module["path"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    # A path that leaves the folder is refused where it is used; nothing from there is copied.
    return sorted(str(p / "config.json") for p in paths if not p.is_absolute() and ".." not in p.parts)
