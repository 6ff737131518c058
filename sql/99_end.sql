-- Last: tell the launcher, if there is one, about this database.

CREATE FUNCTION redrive._created() RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive__created';
COMMENT ON FUNCTION redrive._created IS 'Tell the launcher at commit that this database has the extension';
REVOKE ALL ON FUNCTION redrive._created() FROM PUBLIC;

-- ALTER DEFAULT PRIVILEGES may have given rights on all of this to somebody.
-- Who may write to our tables, or put a trigger on one, runs code as its owner.
DO $$
DECLARE
    v_grantee regrole;
BEGIN
    FOR v_grantee IN
        SELECT DISTINCT x.grantee::regrole
        FROM (
            SELECT nspacl FROM pg_namespace WHERE oid = 'redrive'::regnamespace
            UNION ALL
            SELECT relacl FROM pg_class WHERE relnamespace = 'redrive'::regnamespace
            UNION ALL
            SELECT proacl FROM pg_proc WHERE pronamespace = 'redrive'::regnamespace
        ) AS a (acl)
        CROSS JOIN LATERAL aclexplode(a.acl) AS x
        WHERE x.grantee NOT IN (0, current_user::regrole)
    LOOP
        EXECUTE format('REVOKE ALL ON SCHEMA redrive FROM %s', v_grantee);
        EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA redrive FROM %s', v_grantee);
        EXECUTE format('REVOKE ALL ON ALL SEQUENCES IN SCHEMA redrive FROM %s', v_grantee);
        EXECUTE format('REVOKE ALL ON ALL ROUTINES IN SCHEMA redrive FROM %s', v_grantee);
    END LOOP;
END
$$;

SELECT redrive._created();
