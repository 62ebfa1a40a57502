"""Corpora, vocabulary, span corruption, batches."""
