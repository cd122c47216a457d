from datasets import load_dataset

from logitcask import RowDecoder

rows = load_dataset("arrow", data_files="caches/mine/data/*.arrow", split="train")
decoded = rows.with_format("arrow").map(
    RowDecoder("caches/mine"), batched=True, batch_size=64, remove_columns=rows.column_names
)
row = decoded.with_format(None)[0]
at, ids = row["positions"][0], row["head_ids"][0]
print(f"{row['sequence_id']}: after token {at} the teacher expects {ids[0]} most")
