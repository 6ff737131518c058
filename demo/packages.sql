-- The tables and the two handlers of the demo.  Run by the role that is to own
-- them: handlers run with the rights of the role that created them.

-- The value of a field of a stanza, NULL if it has none.
CREATE FUNCTION field(stanza text, name text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT substring(stanza FROM '(?n)^' || name || ': *(.*)$')
$$;

-- The input: the stanzas of the package index as they were read.
CREATE TABLE stanza (
    no bigint GENERATED ALWAYS AS IDENTITY,
    name text GENERATED ALWAYS AS (field(body, 'Package')) STORED,
    body text NOT NULL
);
CREATE INDEX stanza_name_idx ON stanza (name);

-- The output.
CREATE TABLE package (
    name text PRIMARY KEY,
    version text NOT NULL,
    section text,
    installed_kb bigint
);
-- "mta" is no package, but postfix and exim provide it.
CREATE TABLE provides (
    name text NOT NULL,
    package text NOT NULL REFERENCES package
);
CREATE INDEX provides_name_idx ON provides (name);
-- Each name in Depends, and the package that fulfils it.
CREATE TABLE dependency (
    package text NOT NULL REFERENCES package,
    wanted text NOT NULL,
    target text NOT NULL REFERENCES package
);

-- What happened, one row each time: nothing here hides work that is lost or
-- done twice, for there is no unique constraint.
CREATE TABLE linked (
    package text NOT NULL REFERENCES package,
    attempt int NOT NULL,
    worker int NOT NULL DEFAULT pg_backend_pid()
);
CREATE TABLE unlocked (
    key text NOT NULL
);

-- The names in a part of a list: "a (>= 1) | b:any" gives a and b.
CREATE FUNCTION names(part text) RETURNS SETOF text
LANGUAGE sql IMMUTABLE ROWS 2 AS $$
    SELECT substring(a FROM '[a-z0-9][a-z0-9.+-]*') FROM string_to_table(part, '|') AS a
$$;

-- Handler 1: load one stanza.  A handler of this kind gets the payload.
CREATE FUNCTION load_package(payload jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_stanza text := payload #>> '{}';
    v_name text := field(v_stanza, 'Package');
BEGIN
    -- A validation error: the item is ignored, and not tried again.
    IF field(v_stanza, 'Description') ~* '\m(transitional|dummy) (dummy )?package' THEN
        PERFORM redrive.raise_validation(format('package "%s" is transitional', v_name));
    END IF;

    INSERT INTO package (name, version, section, installed_kb)
    VALUES (v_name, field(v_stanza, 'Version'), field(v_stanza, 'Section'), field(v_stanza, 'Installed-Size')::bigint)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        PERFORM redrive.raise_validation(format('package "%s" is there in another version', v_name));
    END IF;

    INSERT INTO provides (name, package)
    SELECT DISTINCT n, v_name
    FROM string_to_table(field(v_stanza, 'Provides'), ',') AS part
    CROSS JOIN names(part) AS n;
END
$$;

-- Handler 2: link a package to those it depends on.  A handler of this kind
-- gets the whole item; the key is the package, the payload its Depends field.
--
-- Nothing here knows about retries.  When the package or a target is not
-- there, the foreign key says so (SQLSTATE 23503): by default that is an error
-- worth a retry, as the parent may still arrive.
CREATE FUNCTION link_dependencies(item redrive.item) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO linked (package, attempt) VALUES (item.key, item.attempt);

    INSERT INTO dependency (package, wanted, target)
    SELECT item.key, part, coalesce(found.package, (SELECT n FROM names(part) AS n LIMIT 1))
    FROM string_to_table(item.payload ->> 'depends', ',') AS part
    LEFT JOIN LATERAL (
        -- the first of the alternatives that is a package, or is provided by one
        SELECT coalesce(p.name, (SELECT v.package FROM provides AS v WHERE v.name = n LIMIT 1)) AS package
        FROM names(part) WITH ORDINALITY AS a (n, place)
        LEFT JOIN package AS p ON p.name = n
        WHERE p.name IS NOT NULL OR EXISTS (SELECT FROM provides AS v WHERE v.name = n)
        ORDER BY place
        LIMIT 1
    ) AS found ON true;
END
$$;

-- Called once for each key, when its item is final, whatever the outcome.
CREATE FUNCTION note_unlock(key text) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO unlocked (key) VALUES (key)
$$;

SELECT redrive.create_handler('load_package', 'load_package',
    -- an open batch that nobody adds to for so long is given up; by default an hour
    start_timeout => '5 s');
SELECT redrive.create_handler('link_dependencies', 'link_dependencies',
    -- 5 attempts: after 2, 4, 8 and 16 seconds more it is known to be nowhere
    max_retries => 4, retry_delay => '2 s', retry_factor => 2,
    -- leave workers to those who load
    max_workers => 2,
    on_unlock => 'note_unlock');
