"""What a source of pictures names, without opening them: folders, tables, shards and
data sets.
"""
