-- Last: tell the launcher, if there is one, about this database.

CREATE FUNCTION redrive._created() RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive__created';
COMMENT ON FUNCTION redrive._created IS 'Tell the launcher at commit that this database has the extension';
REVOKE ALL ON FUNCTION redrive._created() FROM PUBLIC;

SELECT redrive._created();
