DELETE FROM cloob_state;
