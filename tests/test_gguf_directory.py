"""A GGUF file and the Hugging Face directory that it was made from give the same Parquet values."""

import json

import pandas as pd
from checkpoint_files import write_gguf
from gguf_directory import write_directory

import jaxgrad
from jaxgrad import pipeline
from jaxgrad.options import AnalyzeOptions

OPTIONS = AnalyzeOptions(max_length=128, chat="no", parameters="layers.1.")
RECORDS = [
    {"instruction": "leaves at  1234,   56", "output": "waits  789\n\n   12 hours"},
    {"instruction": "wait   12 then  7 ", "output": "the next  train at  2345"},
]


def measure(model, data, output_dir):
    lines = []
    pipeline.run_analysis(
        model_path=str(model),
        data_paths=[data],
        output_dir=output_dir,
        options=OPTIONS,
        say=lines.append,
        progress=False,
    )
    info = json.loads((output_dir / "run.json").read_text())["sessions"][0]["info"]
    return jaxgrad.read_results(output_dir), info, lines


def test_the_parquet_values_are_the_same(tmp_path):
    file = write_gguf(tmp_path / "m.gguf")
    directory = write_directory(file, tmp_path / "d")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([record | {"input": ""} for record in RECORDS]))
    by_file, file_info, file_lines = measure(file, data, tmp_path / "a")
    by_directory, info, lines = measure(directory, data, tmp_path / "b")
    pd.testing.assert_frame_equal(by_file.examples, by_directory.examples, check_exact=True)
    pd.testing.assert_frame_equal(by_file.matrices, by_directory.matrices, check_exact=True)
    assert (by_file.examples["status"] == "ok").all()
    # Each run says what made its tokens.
    assert file_info["tokenizer"] == {"rule": "GGUF metadata: smollm", "notes": []}
    assert info["tokenizer"] == {"rule": "tokenizer.json", "notes": []}
    assert "tokens by GGUF metadata: smollm" in file_lines and "tokens by tokenizer.json" in lines
    assert info["versions"]["tokenizers"]
