-- Rights, and what pg_dump keeps.

-- A role gets what these functions give it and nothing else.  They run with
-- the rights of the caller, who has to be a superuser or own the extension:
-- with a search_path of their own, lest an operator that somebody planted in
-- the caller's be run with these rights.
CREATE FUNCTION redrive._user_routines() RETURNS SETOF regprocedure
LANGUAGE sql STABLE AS $$
    SELECT p.oid::regprocedure
    FROM pg_proc AS p
    WHERE p.pronamespace = 'redrive'::regnamespace
      AND (p.proname NOT LIKE '\_%' OR p.proname IN ('_preloaded', '_owner_needs_login', '_slots', '_require_operator') OR p.proname LIKE '\_report\_%' OR p.proname = '_task_source')
      AND p.proname NOT IN ('run_pass', 'set_retention', 'http_request', 'grant_user', 'grant_monitor', 'revoke_user')
    ORDER BY p.oid
$$;
COMMENT ON FUNCTION redrive._user_routines IS 'Functions that grant_user() grants';

-- GRANT takes even a quoted "public" for everybody.
CREATE FUNCTION redrive._check_role(role name) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF role IS NULL THEN
        RAISE EXCEPTION 'role must not be null' USING ERRCODE = '22004', HINT = 'Give the name of a role.';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
        RAISE EXCEPTION 'role "%" does not exist', role USING ERRCODE = '42704',
            HINT = CASE WHEN role = 'public' THEN 'Rights are given to single roles, not to everybody.' ELSE 'See pg_roles for the roles there are.' END;
    END IF;
END
$$;
COMMENT ON FUNCTION redrive._check_role IS 'Raise an error unless a role of this name exists';

CREATE FUNCTION redrive._grant_views(role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_name text;
BEGIN
    PERFORM redrive._check_role(role);
    EXECUTE format('GRANT USAGE ON SCHEMA redrive TO %I', role);
    FOR v_name IN
        SELECT format('redrive.%I', c.relname)
        FROM pg_class AS c
        WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind = 'v'
          -- what the functions stale_batches_at(), verify() and report_html() read
          AND (c.relname NOT LIKE '\_%' OR c.relname IN ('_stale', '_verify', '_ended', '_pushed', '_waiting'))
        ORDER BY c.relname
    LOOP
        EXECUTE format('GRANT SELECT ON %s TO %I', v_name, role);
    END LOOP;
END
$$;
COMMENT ON FUNCTION redrive._grant_views IS 'Grant what users and monitors have in common';

CREATE FUNCTION redrive.grant_user(role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_routine regprocedure;
BEGIN
    PERFORM redrive._grant_views(role);
    FOR v_routine IN SELECT r FROM redrive._user_routines() AS r LOOP
        EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %I', v_routine, role);
    END LOOP;
END
$$;
COMMENT ON FUNCTION redrive.grant_user IS
'Let a role create handlers, submit batches to its own handlers and look at them in the views. Rows of others stay hidden. Call again after an update of the extension. Errors: 42704 unknown role, 42501 not the owner of the extension.';

CREATE FUNCTION redrive.grant_monitor(role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_routine regprocedure;
BEGIN
    PERFORM redrive._grant_views(role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION redrive._preloaded(), redrive._owner_needs_login(), redrive._slots(), redrive.stale_batches_at(timestamptz), redrive.verify(bigint), redrive.why(bigint), redrive.doctor(), redrive.report_html(interval) TO %I', role);
    FOR v_routine IN SELECT r FROM redrive._user_routines() AS r WHERE r::text LIKE 'redrive.\_report\_%' LOOP
        EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %I', v_routine, role);
    END LOOP;
    -- this is what makes the views show everything
    EXECUTE format('GRANT SELECT (batch_id) ON redrive.batches TO %I', role);
END
$$;
COMMENT ON FUNCTION redrive.grant_monitor IS
'Let a role see the counts of all batches, handlers and workers in the views, but no payloads, keys or messages of others. Call again after an update of the extension. Errors: 42704 unknown role, 42501 not the owner of the extension.';

CREATE FUNCTION redrive.revoke_user(role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM redrive._check_role(role);
    EXECUTE format('REVOKE ALL ON ALL ROUTINES IN SCHEMA redrive FROM %I', role);
    EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA redrive FROM %I', role);
    EXECUTE format('REVOKE ALL ON SCHEMA redrive FROM %I', role);
END
$$;
COMMENT ON FUNCTION redrive.revoke_user IS
'Take back what grant_user and grant_monitor gave. Handlers of the role and their batches stay. Errors: 42704 unknown role, 42501 not the owner of the extension.';

-- The row of rotation is there before pg_dump's copy of it comes: the copy
-- takes its place.
CREATE FUNCTION redrive._restore_rotation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE redrive.rotation SET part = NEW.part, parts = NEW.parts, retention = NEW.retention, rotated_at = NEW.rotated_at;
    IF FOUND THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION redrive._restore_rotation IS 'Let the copy that pg_dump made replace the row of rotation';
CREATE TRIGGER rotation_restore BEFORE INSERT ON redrive.rotation FOR EACH ROW EXECUTE FUNCTION redrive._restore_rotation();

DO $$
DECLARE
    r record;
BEGIN
    -- partitions hold the rows, their parents none
    FOR r IN
        SELECT c.oid::regclass AS relation, CASE c.relname WHEN 'classification_rules' THEN 'WHERE NOT builtin' ELSE '' END AS filter
        FROM pg_class AS c
        WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind IN ('r', 'S') AND c.relname <> 'platform_secrets'
        ORDER BY c.oid
    LOOP
        PERFORM pg_extension_config_dump(r.relation, r.filter);
    END LOOP;
END
$$;

REVOKE ALL ON SCHEMA redrive FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA redrive FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA redrive FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA redrive FROM PUBLIC;
