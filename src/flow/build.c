/*-------------------------------------------------------------------------
 *
 * build.c
 *	  Bodies of pushes that a platform's build function makes.
 *
 * Code of users, so it runs where handlers do: in an executor of the platform's
 * owner, each call in a subtransaction.  The pusher only sends what was made.  No
 * push is locked meanwhile, so an application that records a new status never
 * waits for a build function; what it has overtaken is made again.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "pgstat.h"
#include "utils/builtins.h"
#include "utils/datum.h"
#include "utils/jsonb.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/spi_call.h"
#include "base/wake.h"
#include "base/xact.h"
#include "flow/build.h"
#include "flow/push.h"
#include "flow/segment.h"

#define BUILDS_AT_ONCE 500

/* Commit what was made after so long. */
#define BUILD_INTERVAL_US 250000

static RedriveSql free_builds = {
	"SELECT (b.platform).platform_id::int8 AS platform_id, (b.platform).name, (b.platform).build, (b.platform).config_version, b.push_ids"
	" FROM redrive._free_builds($1, $2, $3) AS b WHERE b.push_ids IS NOT NULL",
	3, {OIDOID, TIMESTAMPTZOID, INT4OID}
};

static RedriveSql tasks_of_pushes = {
	.lookups = true,
	.text =
	"SELECT u.push_id, t.version, ROW(t.task_key, t.status, t.version, t.process, t.payload, t.created_at, t.changed_at)::redrive.task AS task"
	" FROM unnest($1) AS n (push_id) JOIN redrive.pushes AS u ON u.push_id = n.push_id JOIN redrive.tasks AS t ON t.task_id = u.task_id",
	.nargs = 1,.argtypes = {INT8ARRAYOID}
};

/*
 * Keep the platform as it was when its function was read: waits for who gives it
 * another one or drops it, and finds nothing if that was done.
 */
static RedriveSql keep_platform = {
	"SELECT FROM redrive.platforms AS p WHERE p.platform_id = $1 AND p.config_version = $2 FOR KEY SHARE",
	2, {INT4OID, INT8OID}
};

/*
 * $1 number, $2 version, $3 body, $4 error; $5 now.  A failure is an attempt like
 * any other.  What is not wanted any more is left alone, and what somebody has locked
 * is made again: an application may want next what we have locked.  The states are
 * told by those it must not have, lest the index of what is due is taken for the way
 * to each row.
 */
static RedriveSql record_builds = {
	.lookups = true,
	.text =
	"WITH live AS MATERIALIZED ("
	" SELECT u.push_id, n.version, n.body, n.error, n.body IS NULL AS failed, u.retry_count >= p.max_retries AS exhausted,"
	"  $5 + redrive._retry_delay(p.retry_interval, p.retry_factor, p.retry_delay_max, u.retry_count, u.push_id) AS retry_at"
	" FROM unnest($1, $2, $3, $4) AS n (push_id, version, body, error)"
	" JOIN redrive.pushes AS u ON u.push_id = n.push_id"
	" JOIN redrive.platforms AS p ON p.platform_id = u.platform_id"
	" WHERE u.awaits_build AND u.state NOT IN ('delivered', 'dead', 'blocked') AND u.wanted_version = n.version"
	" FOR NO KEY UPDATE OF u SKIP LOCKED),"
	" built AS (INSERT INTO redrive.push_bodies (push_id, version, body) SELECT l.push_id, l.version, l.body FROM live AS l WHERE NOT l.failed"
	"  ON CONFLICT (push_id) DO UPDATE SET version = excluded.version, body = excluded.body, built_at = now()),"
	" changed AS (UPDATE redrive.pushes AS u SET"
	"   awaits_build = l.failed,"
	"   attempt_no = u.attempt_no + l.failed::int,"
	"   state = CASE WHEN NOT l.failed THEN u.state WHEN l.exhausted THEN 'dead' ELSE 'waiting' END,"
	"   retry_count = u.retry_count + (l.failed AND NOT l.exhausted)::int,"
	"   next_attempt_at = CASE WHEN l.failed AND NOT l.exhausted THEN l.retry_at ELSE u.next_attempt_at END,"
	"   failed_at = CASE WHEN l.failed THEN $5 ELSE u.failed_at END,"
	"   http_status = CASE WHEN l.failed THEN NULL ELSE u.http_status END,"
	"   error_class = CASE WHEN l.failed THEN 'build' ELSE u.error_class END,"
	"   message = CASE WHEN l.failed THEN l.error ELSE u.message END"
	"  FROM live AS l WHERE u.push_id = l.push_id"
	"  RETURNING u.push_id, u.attempt_no, u.platform_id, l.version, l.error)"
	" INSERT INTO redrive.push_log (part, push_id, attempt_no, platform_id, version, started_at, finished_at, delivered, charged, is_probe, error_class, message)"
	" SELECT (SELECT r.part FROM redrive.rotation AS r), c.push_id, c.attempt_no, c.platform_id, c.version, $5, clock_timestamp(), false, true, false, 'build', c.error"
	" FROM changed AS c WHERE c.error IS NOT NULL",
	.nargs = 5,.argtypes = {INT8ARRAYOID, INT8ARRAYOID, TEXTARRAYOID, TEXTARRAYOID, TIMESTAMPTZOID}
};

/*
 * Return what a build function returned as the text of a body, in cxt.
 *
 * Throws 22004 when it is NULL, 54000 when it is too long.
 */
char *
redrive_built_body(Datum result, bool isnull, MemoryContext cxt)
{
	Jsonb	   *jsonb;
	char	   *body;

	if (isnull)
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("the build function returned NULL"),
				 errhint("Return the body of the request as jsonb.")));
	jsonb = DatumGetJsonbP(result);
	body = JsonbToCString(NULL, &jsonb->root, VARSIZE(jsonb));
	if (strlen(body) > REDRIVE_HTTP_MAX_BODY)
		ereport(ERROR,
				(errcode(ERRCODE_PROGRAM_LIMIT_EXCEEDED),
				 errmsg("the body that the build function returned is too long"),
				 errdetail("It has %zu bytes, of %d at most.", strlen(body), REDRIVE_HTTP_MAX_BODY),
				 errhint("Send less, a reference to the rest for example.")));
	return MemoryContextStrdup(cxt, body);
}

/*
 * Build bodies that are due, for one platform of a role, and commit.
 *
 * Returns whether there were any.  Needs a non-atomic connection.
 */
bool
redrive_run_due_builds(RedriveSlot *slot, Oid owner)
{
	const TimestampTz now = GetCurrentTimestamp();
	Datum		values[5];
	char	   *function;
	char	   *name;
	int32		platform_id;
	int64		config_version;
	bool		isnull;
	uint64		rows;
	Datum	   *tasks;
	Datum	   *ids;
	Datum	   *versions;
	Datum	   *bodies;
	Datum	   *errors;
	bool	   *failed;
	bool	   *succeeded;
	int			n = 0;

	values[0] = ObjectIdGetDatum(owner);
	values[1] = TimestampTzGetDatum(now);
	values[2] = Int32GetDatum(BUILDS_AT_ONCE);
	if (redrive_sql(&free_builds, values, NULL) == 0)
		return false;
	function = redrive_text(0, "build", CurrentMemoryContext);
	name = redrive_text(0, "name", CurrentMemoryContext);
	platform_id = (int32) redrive_int64(0, "platform_id");
	config_version = redrive_int64(0, "config_version");
	values[0] = redrive_column(0, "push_ids", &isnull);
	rows = redrive_sql(&tasks_of_pushes, values, NULL);
	slot->state = SLOT_CALLBACKS;
	if (!slot->foreground)
		pgstat_report_activity(STATE_RUNNING, psprintf("redrive: build for platform %s", name));
	tasks = palloc(rows * sizeof(Datum));
	ids = palloc(rows * sizeof(Datum));
	versions = palloc(rows * sizeof(Datum));
	bodies = palloc0(rows * sizeof(Datum));
	errors = palloc0(rows * sizeof(Datum));
	failed = palloc(rows * sizeof(bool));
	succeeded = palloc(rows * sizeof(bool));
	for (uint64 row = 0; row < rows; row++)
	{
		ids[row] = Int64GetDatum(redrive_int64(row, "push_id"));
		versions[row] = Int64GetDatum(redrive_int64(row, "version"));
		tasks[row] = datumCopy(redrive_column(row, "task", &isnull), false, -1);
	}
	redrive_free_rows();
	while (n < rows)
	{
		int64		push_id = DatumGetInt64(ids[n]);
		ErrorData  *error = NULL;
		char	   *body;

		succeeded[n] = redrive_run_callbacks(function, CALLBACK_BUILD, 0, 1, &tasks[n], CRUMB_BUILD, &push_id, &body, &error);
		failed[n] = !succeeded[n];
		if (succeeded[n])
			bodies[n] = CStringGetTextDatum(body);
		else
			errors[n] = CStringGetTextDatum(psprintf("%s: %s", unpack_sql_state(error->sqlerrcode), error->message != NULL ? error->message : ""));
		n++;
		if (GetCurrentTimestamp() - now >= BUILD_INTERVAL_US || redrive_live_subxacts() >= MAX_LIVE_SUBXACTS || redrive_stop_requested())
			break;
	}
	values[0] = Int32GetDatum(platform_id);
	values[1] = Int64GetDatum(config_version);
	/* before any push is locked, as everywhere; else they are made again */
	if (redrive_sql(&keep_platform, values, NULL) > 0)
	{
		values[0] = redrive_array(INT8OID, n, ids, NULL);
		values[1] = redrive_array(INT8OID, n, versions, NULL);
		values[2] = redrive_array(TEXTOID, n, bodies, failed);
		values[3] = redrive_array(TEXTOID, n, errors, succeeded);
		values[4] = TimestampTzGetDatum(now);
		(void) redrive_sql(&record_builds, values, NULL);
		redrive_wake_pusher_at_commit();
	}
	redrive_commit();
	slot->state = SLOT_CLAIMING;
	return true;
}
