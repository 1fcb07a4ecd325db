UPDATE vectors SET vector = zeroblob(4004);
