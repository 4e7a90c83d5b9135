"""What merges and conversions write, pinned: a table of hashes, made once, that a rebuild must not change.

- `inputs.py` makes the models, from fixed seeds, in every form that people have them in
- `cases.py` lists what is done with them, as data, by blockmerge's public interface alone
- `running.py` runs one case and says what it wrote
- `outputs.json` is the table: for each case the number of tensors, and hashes of what can change by itself

`python -m tests.pinned` writes the table anew. That is done only when an issue says that an output changes,
and the commit says why. New cases are added in the same way; the other lines of the table then stay as they
are. On another torch or another kind of processor than the table's, the tensors' bytes are not compared.
"""
