"""Engines of decoders with modules. They are really built; where one would run, its graph does."""

import shutil
from pathlib import Path

import pytest
from artefacts import Artefacts
from test_decoder_assemblies import text_bundle  # noqa: F401 (a fixture)
from test_text_engines import SETS, TARGET, _session, gpu  # noqa: F401 (a fixture)
from test_text_to_text import _inputs

from variator_export import Bundle, UserError
from variator_export.building.compile_engines import compile_engines
from variator_export.building.steps.engines import EngineOrder
from variator_export.core.parts import DECODER, ENCODER
from variator_export.engines.target import GeneratingSession
from variator_export.recipe.recipe import EngineRecipe
from variator_export.verification.bundle_verification import verify

VARIANT = "enc-2x2_dec-2x2-1"
ORDER = EngineOrder(EngineRecipe(profiles=SETS), (TARGET,), (VARIANT, "any-ratio"))


@pytest.fixture(scope="module")
def compiled(artefacts: Artefacts, text_bundle: Path) -> Path:  # noqa: F811
    """A bundle with engines of an assembly and of every ratio; not to be changed."""

    def make(folder: Path) -> None:
        shutil.copytree(text_bundle, folder, dirs_exist_ok=True)
        compile_engines(folder, ORDER)

    return artefacts.folder("decoder-engines", make)


def test_an_assembly_has_an_engine_of_its_decoder(compiled: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(compiled)
    engines = {(entry.variant, entry.part) for entry in bundle.manifest.engines}
    assert engines == {
        (VARIANT, ENCODER),
        ("any-ratio", ENCODER),
        ("dec-2x2-1", DECODER),
        ("any-ratio", DECODER),
    }
    own = next(e for e in bundle.manifest.engines if (e.variant, e.part) == ("dec-2x2-1", DECODER))
    made_from = bundle.sidecar(own)["made_from"]
    assert set(made_from["modules"]) == {"modules/dec-g2/modules.safetensors"}
    assert bundle.graph_of_engine(own) == f"dec-2x2-1_{DECODER}.onnx"
    (profile,) = bundle.sidecar(own)["profiles"]
    assert "past_key_values.2.decoder.key" in profile["shapes"]
    assert "past_key_values.3.decoder.key" not in profile["shapes"]
    # Nothing is built again, and another variant with the decoder takes the same engine.
    folder = tmp_path / "again"
    shutil.copytree(compiled, folder)
    order = EngineOrder(EngineRecipe(profiles=SETS), (TARGET,), ("dec-2x2-1",))
    made = [s.name for s in compile_engines(folder, order).steps if s.action == "made"]
    assert [name.rpartition("/")[2] for name in made] == [f"dec-2x2-1_{ENCODER}"]


@pytest.mark.usefixtures("gpu")
def test_engines_generate_what_the_graphs_do(compiled: Path) -> None:
    bundle = Bundle.load(compiled)
    graphs, own, shared = bundle.session(), _session(bundle, VARIANT), _session(bundle)
    assert isinstance(graphs, GeneratingSession)
    for opened, variant in ((own, VARIANT), (shared, "ratio-2"), (shared, "ratio-1")):
        inputs = _inputs(4, 13, 3)
        expected = graphs.generate(inputs, variant, max_new_tokens=12, num_beams=3)
        found = opened.generate(inputs, variant, max_new_tokens=12, num_beams=3)
        for row, theirs in zip(found.tokens, expected.tokens, strict=True):
            assert list(map(list, row)) == list(map(list, theirs))
    with pytest.raises(UserError, match="has the original layers alone"):
        shared.generate(_inputs(1, 5, 0), VARIANT, max_new_tokens=4)
    with pytest.raises(UserError, match=r"no engine of enc-2-1x2_dec-3-1x2_ratio-2 for tensorrt-rtx"):
        _session(bundle, "enc-2-1x2_dec-3-1x2_ratio-2")


@pytest.mark.usefixtures("gpu")
def test_engines_of_an_assembly_are_verified(compiled: Path) -> None:
    found = verify(compiled, [VARIANT], target=TARGET)
    assert found.passed, found.failures
    ran = {Path(finding.question.graph).name for finding in found.findings[VARIANT]}
    assert ran == {f"{VARIANT}_{ENCODER}.engine", f"dec-2x2-1_{DECODER}.engine"}
