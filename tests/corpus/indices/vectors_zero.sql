UPDATE vectors SET vector = zeroblob(length(vector));
