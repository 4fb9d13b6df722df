"""The peer's side of encode_100k.py: loading, preprocessing and tokenising as its `swift sft` does.

Runs in an interpreter in which ms-swift 4 is installed, not ours.
"""

import argparse
import json
import time

from swift import EncodePreprocessor, get_processor, get_template, load_dataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--only")
    parser.add_argument("--processes", type=int)
    options = parser.parse_args()
    template = get_template(
        get_processor(options.model, model_type="llama"), max_length=2048, template_type="chatml"
    )
    template.set_mode("train")
    start = time.perf_counter()
    rows, _ = load_dataset(options.only, num_proc=options.processes, load_from_cache_file=False)
    encoded = EncodePreprocessor(template=template)(
        rows, num_proc=options.processes, load_from_cache_file=False
    )
    seconds = time.perf_counter() - start
    sample = encoded[0]
    assert len(sample["input_ids"]) == len(sample["labels"])
    print(json.dumps({"what": "encoded", "seconds": round(seconds, 2), "rows": len(encoded)}), flush=True)


if __name__ == "__main__":
    main()
