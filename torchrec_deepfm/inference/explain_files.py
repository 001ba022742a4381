"""``explain``: the first rows of some files taken apart, fields by importance, as text, Parquet and a page."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from torchrec_deepfm.data.raw.table_source import TableSource
from torchrec_deepfm.errors import UserError, check_range
from torchrec_deepfm.files import check_parquet_name, check_target, write_bytes
from torchrec_deepfm.inference.explain import Explanation, Importance, explain_rows, importance
from torchrec_deepfm.inference.load import Predictor
from torchrec_deepfm.inference.predict import open_sources
from torchrec_deepfm.report.page import PageTable, Paragraph, Section, write_page


@dataclass(frozen=True, kw_only=True)
class Explained:
    """The first rows, and the fields, most important first, as measured over so many rows."""

    rows: Explanation
    fields: Sequence[Importance]
    measured: int

    def text(self) -> str:
        """Return rows and fields as lines for a terminal."""
        lines = [self.rows.text(row) for row in range(len(self.rows.values))]
        lines.append(f"importance of the fields over {self.measured:,} rows")
        lines.append(f"  {'field':<40}{'mean |contribution|':>22}{'AUC loss, shuffled':>22}")
        for one in self.fields:
            loss = "-" if one.auc_loss is None else f"{one.auc_loss:.5f}"
            lines.append(f"  {one.field:<40}{one.contribution:>22.5f}{loss:>22}")
        return "\n".join(lines)

    def write(self, rows: Path | None, page: Path | None, title: str) -> list[Path]:
        """Write the files that are asked for, and list them.

        The Parquet file ``rows`` has a part of a row per line; the fields go to ``NAME_fields.parquet``.
        """
        written = []
        if rows is not None:
            fields = _beside(rows)
            _write_table(self.rows.table(), rows)
            _write_table(pl.DataFrame([asdict(one) for one in self.fields]), fields)
            written += [rows, fields]
        if page is not None:
            write_page(page, title, self._sections())
            written.append(page)
        return written

    def _sections(self) -> list[Section]:
        fields = PageTable(
            ("field", "mean |contribution|", "AUC loss, shuffled"),
            [(one.field, one.contribution, one.auc_loss) for one in self.fields],
            caption=f"Importance over {self.measured:,} rows.",
            formats={"mean |contribution|": ".5f", "AUC loss, shuffled": ".5f"},
        )
        sections = [Section("Fields", fields)]
        table = self.rows.table()
        for row, probability in enumerate(self.rows.probabilities.tolist()):
            parts = table.filter(pl.col("row") == row).sort(pl.col("contribution").abs(), descending=True).head(25)
            lines = [
                (part, _named(field, value), _named(other, second), amount)
                for _, part, field, value, other, second, amount in parts.rows()
            ]
            logit = self.rows.logits[row]
            about = Paragraph(f"Probability {probability:.5f}, logit {logit:+.5f}. The 25 largest parts of the logit:")
            head = ("part", "field", "other field", "contribution")
            sections.append(Section(f"Row {row + 1}", about, PageTable(head, lines, formats={"contribution": "+.5f"})))
        return sections


def explain_files(
    predictor: Predictor,
    inputs: Sequence[str],
    *,
    rows: int,
    importance_rows: int,
    output: Path | None = None,
    page: Path | None = None,
) -> Explained:
    """Explain the first ``rows`` rows of some files, and which fields matter over ``importance_rows`` of them.

    With labels the AUC's loss is measured too. ``output`` and ``page``, for ``Explained.write``, are checked first.
    """
    check_range("rows", rows, 0)
    check_range("importance_rows", importance_rows, 1)
    if output is not None:
        check_parquet_name("--output", output)
    targets = _targets(output, page)
    for number, (option, target) in enumerate(targets):
        like = "explained.parquet" if option == "--output" else "explained.html"
        check_target(option, target, like=like, inputs=[other for _, other in targets[:number]])
        if target.exists():
            raise UserError("the file exists", where=f"{option} {target}", remedy="name another one, or remove it")
    sources = open_sources(predictor.encoder, inputs)
    label = predictor.encoder.raw_schema.label
    if all(isinstance(source, TableSource) and label in source.file.fields for source in sources):
        sources = open_sources(predictor.encoder, inputs, labelled=True)
    frames, found, most = [], 0, max(rows, importance_rows)
    for source in sources:
        for piece in source.pieces(start=0, line=0, skip_bad=False):
            frames.append(piece.frame.head(most - found))
            found += len(frames[-1])
            if found == most:
                break
        if found == most:
            break
    raw = pl.concat(frames, how="vertical_relaxed")
    encoder, scorer = predictor.encoder, predictor.score
    head, measured = raw.head(rows), raw.head(importance_rows)
    explained = explain_rows(scorer, encoder.encode_piece(head), encoder.texts(head))
    labels = measured["label"].to_numpy().astype("int64") if "label" in raw.columns else None
    fields = importance(scorer, encoder.encode_piece(measured), labels)
    return Explained(rows=explained, fields=fields, measured=len(measured))


def _targets(output: Path | None, page: Path | None) -> list[tuple[str, Path]]:
    """The files to write, with their options."""
    found = [] if output is None else [("--output", output), ("--output", _beside(output))]
    return found if page is None else [*found, ("--page", page)]


def _beside(rows: Path) -> Path:
    return rows.with_name(f"{rows.stem}_fields{rows.suffix}")


def _write_table(table: pl.DataFrame, path: Path) -> None:
    sink = io.BytesIO()
    table.write_parquet(sink)
    try:
        write_bytes(path, sink.getvalue())
    except OSError as error:
        raise UserError(
            f"the file can't be written ({error.strerror})", where=f"--output {path}", remedy="name another one"
        ) from error


def _named(field: str | None, value: str | None) -> str | None:
    return None if field is None else f"{field}={value or '(missing)'}"
