"""Files of a verification for other programs: JUnit XML and Markdown."""

from xml.etree import ElementTree

from variator_export.verification.bundle_verification import Verification


def junit_xml(result: Verification) -> str:
    """Return JUnit XML: a suite per variant, a test case per finding, loss and precision of an engine."""
    root = ElementTree.Element("testsuites", name=f"variator-export verify {result.bundle.name}")
    for variant, findings in result.findings.items():
        left_out = result.left_out.get(variant, ())
        has_precision, imprecise = variant in result.precisions, result.imprecise.get(variant)
        losses = result.losses.get(variant, ())
        num_failed = sum(not finding.passed for finding in findings)
        num_failed += sum(not loss.passed for loss in losses) + (imprecise is not None)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=variant,
            tests=str(len(findings) + len(losses) + has_precision + len(left_out)),
            failures=str(num_failed),
            errors="0",
            skipped=str(len(left_out)),
            timestamp=result.verified_at,
        )
        for finding in findings:
            question = finding.question
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"{variant}.{question.graph}",
                name=f"{question.check}: {question.case}: {question.output}",
            )
            if not finding.passed:
                failure = ElementTree.SubElement(
                    case, "failure", message=finding.problem or "outside the limit"
                )
                failure.text = str(finding)
        for loss in losses:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"{variant}.quantization", name=f"near float32: {loss.output}"
            )
            if not loss.passed:
                ElementTree.SubElement(case, "failure", message=str(loss))
        for left in left_out:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"{variant}.{left.graph}", name=f"{left.check}: left out"
            )
            why = f"left out: {', '.join(left.what)}"
            ElementTree.SubElement(case, "skipped", message=why)
        if has_precision:
            case = ElementTree.SubElement(
                suite, "testcase", classname=f"{variant}.{result.target}", name="precision in the engine"
            )
            if imprecise is not None:
                ElementTree.SubElement(case, "failure", message=imprecise)
    for element in root.iter("testsuite"):
        for count in ("tests", "failures", "skipped"):
            root.set(count, str(int(root.get(count, "0")) + int(element.get(count, "0"))))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(result: Verification) -> str:
    """Return a Markdown summary for a pull request or a release."""
    failed = [*map(str, result.failures), *map(str, result.too_lossy)]
    failed += [f"{name}: {why}" for name, why in result.imprecise.items()]
    verdict = f"{len(failed)} checks FAILED" if failed else "all checks passed"
    where = result.gpu or result.machine["cpu"] or "an unknown CPU"
    lines = [
        f"# Verification of {result.bundle.name}: {verdict}",
        "",
        f"Compared with {result.reference}, at {result.verified_at} on {where}. {result.unit}",
        "",
        "| variant | graph | check | cases | worst | allowed | |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for row in result.summary():
        worst = "-" if row.worst is None else f"{row.worst:.2f}"
        outcome = "passed" if row.failed == 0 else f"**{row.failed} failed**"
        cells = (row.variant, row.graph, row.check, row.count, worst, f"{row.allowed:g}", outcome)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    losses = [str(loss) for found in result.losses.values() for loss in found]
    if losses:
        lines += ["", "## Quantisation", "", *(f"- {words}" for words in losses)]
    if failed:
        lines += ["", "## Failures", "", *(f"- {words}" for words in failed)]
    partings = [f"{name}, {p}" for name, found in result.partings.items() for p in found]
    if partings:
        lines += ["", "## Generated text that parts", "", *(f"- {words}" for words in partings)]
    left_out = [str(left) for found in result.left_out.values() for left in found]
    if left_out:
        lines += ["", "## Left out", "", *(f"- {words}" for words in left_out)]
    if result.bisections:
        lines += ["", "## Where", "", *(f"- {bisection}" for bisection in result.bisections)]
    return "\n".join(lines) + "\n"
