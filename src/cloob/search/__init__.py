"""Find things in a collection of pictures: index it once, then search by words and pictures, sort it and look at it.

Read in this order: ``records`` (what an index holds), ``store`` (what keeps it), ``index`` (what a user does with it).
"""
