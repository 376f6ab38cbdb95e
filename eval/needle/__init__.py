"""Needle evaluation: can the model find what it read, by context length and by depth?

    words.py       the vocabulary: keys, values, noise, prose, all drawn from a generator that is passed in
    tasks.py       what a task is, the shipped ones by name
    haystack.py    units of filler text, filling a prompt to the token, placing needles at a depth
    generate.py    one document: seeding, wording, schema; needles and variable tracing
    counting.py    documents of the two counting tasks (common words, coded words)
    passages.py    documents of question answering over a local file
    tokens.py      documents of token ids, without text or tokenizer
    score.py       one prediction -> recall, exact, diagnostics
    cells.py       scores -> cells (task, protocol, length, depth), effective length, summary, CSV
    heatmap.py     cells -> pictures

Nothing here knows a model. Documents and scores are plain dictionaries and need numpy and the standard library only.
"""
