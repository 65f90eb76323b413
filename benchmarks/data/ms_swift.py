"""ms-swift's own way from files to tokenised rows for gpt-oss; speed.py runs this with a Python that has ms-swift.

python ms_swift.py MODEL encode|lazy PROCESSES FILE …   prints [seconds, rows, tokens]

`encode` tokenises all rows and stores them (EncodePreprocessor); `lazy` tokenises while a data loader asks and stores
nothing (LazyLLMDataset), as `swift sft` does while training.
"""

import json
import os
import sys
import tempfile
import time

model, mode, processes, files = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
os.environ["LOG_LEVEL"] = "ERROR"
os.environ["HF_HUB_OFFLINE"] = "1"
with tempfile.TemporaryDirectory() as cache:
    os.environ["MODELSCOPE_CACHE"], os.environ["HF_DATASETS_CACHE"] = f"{cache}/ms", f"{cache}/hf"
    import datasets
    from swift.dataset import EncodePreprocessor, LazyLLMDataset, load_dataset
    from swift.model import get_processor
    from swift.template import get_template
    from torch.utils.data import DataLoader

    datasets.disable_progress_bars()
    processor = get_processor(model, model_type="gpt_oss")
    template = get_template(processor, template_type="gpt_oss", max_length=4096, loss_scale="default")
    template.set_mode("train")
    template.encode({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})

    started = time.perf_counter()
    rows = load_dataset(
        files, split_dataset_ratio=0.0, num_proc=processes, load_from_cache_file=False, shuffle=False, strict=False
    )[0]
    if mode == "encode":
        encoded = EncodePreprocessor(template=template)(
            rows, num_proc=processes, load_from_cache_file=False, strict=False, batch_size=1000
        )
        seconds = time.perf_counter() - started
        count, tokens = len(encoded), sum(sum(length) for length in encoded["lengths"])
    else:
        lazy = LazyLLMDataset(rows, template.encode, strict=False)
        count = tokens = 0
        for batch in DataLoader(lazy, batch_size=64, num_workers=processes, collate_fn=list):
            count += len(batch)
            tokens += sum(len(row["input_ids"]) for row in batch)
        seconds = time.perf_counter() - started
print(json.dumps([seconds, count, tokens]))
