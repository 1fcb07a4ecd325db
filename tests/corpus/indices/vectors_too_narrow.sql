UPDATE vectors SET vector = x'00';
