"""Sentence embeddings of files of any length: in constant memory, in several processes, resumable.

The input is cut into chunks of a fixed number of texts. Each finished chunk is a file of its own in
`OUTPUT.parts/`, written whole or not at all, so a kill loses only the chunks in work. At the end the parts
become the output, in the order of the texts.
"""
