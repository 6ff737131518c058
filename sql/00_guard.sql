\echo Use "CREATE EXTENSION pg_redrive" to load this file. \quit

-- A schema of this name that is already there is refused: whoever made it
-- could have planted objects in it.
CREATE SCHEMA redrive;
COMMENT ON SCHEMA redrive IS 'pg_redrive: batches of items run, retried and rescued inside the database';
