"""Find things in a collection of pictures: index it once, then search by words and
pictures, sort it and look at it.
"""
