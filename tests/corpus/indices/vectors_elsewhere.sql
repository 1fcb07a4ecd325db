UPDATE cloob_contents SET row = -1;
