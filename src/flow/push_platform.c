/*-------------------------------------------------------------------------
 *
 * push_platform.c
 *	  Platforms as the pusher knows them: read, and written down.
 *
 * The breaker of a platform lives in the pusher; the row of platform_states is
 * a copy, for people and for the next pusher.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "common/base64.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timestamp.h"

#include "base/spi_call.h"
#include "flow/push.h"

#define FIRST_LIMIT 4
#define OUR_HEADERS 8

static RedriveSql load_platforms = {
	"SELECT p.platform_id, p.owner, p.name, p.config_version, p.paused, p.build IS NOT NULL AS has_build, p.success_when,"
	" p.method::text AS method, p.url, p.headers, p.allow_http, ARRAY(SELECT c::text FROM unnest(p.allow_cidr) AS c) AS allow,"
	" (extract(epoch FROM p.timeout) * 1000)::int8 AS timeout_ms, (extract(epoch FROM p.connect_timeout) * 1000)::int8 AS connect_timeout_ms,"
	" extract(epoch FROM p.retry_interval)::float8 AS retry_interval_s, p.max_retries, p.permanent_status, p.max_in_flight, coalesce(p.rate_limit, 0) AS rate_limit,"
	" p.secrets::text[] <> ARRAY(SELECT k.kind::text FROM redrive.platform_secrets AS k WHERE k.platform_id = p.platform_id ORDER BY k.kind) AS secrets_lost,"
	" (SELECT k.secret FROM redrive.platform_secrets AS k WHERE k.platform_id = p.platform_id AND k.kind = 'signing') AS signing,"
	" (SELECT k.secret FROM redrive.platform_secrets AS k WHERE k.platform_id = p.platform_id AND k.kind = 'signing_previous') AS signing_previous,"
	" (SELECT k.secret FROM redrive.platform_secrets AS k WHERE k.platform_id = p.platform_id AND k.kind = 'bearer') AS bearer,"
	" (SELECT k.secret FROM redrive.platform_secrets AS k WHERE k.platform_id = p.platform_id AND k.kind = 'basic') AS basic,"
	" s.breaker::text AS breaker, s.reason, s.opened_at, s.blocked_until, s.times_opened::int8 AS times_opened,"
	" s.failures_in_row::int8 AS failures_in_row"
	" FROM redrive.platforms AS p JOIN redrive.platform_states AS s ON s.platform_id = p.platform_id ORDER BY p.platform_id",
	0, {0}
};

static RedriveSql platforms_version = {
	"SELECT coalesce(bit_xor(hashint8extended(p.config_version * 2 + p.paused::int, p.platform_id)), 0) AS version FROM redrive.platforms AS p",
	0, {0}
};

static RedriveSql write_platform = {
	"UPDATE redrive.platform_states SET breaker = $2::redrive.breaker_state, reason = $3, opened_at = $4, blocked_until = $5, times_opened = $6,"
	" failures_in_row = $7, successes_in_row = $8, window_started_at = $9, window_attempts = $10, window_failures = $11, in_flight_limit = $12,"
	" attempts = attempts + $13, delivered = delivered + $14, last_delivered_at = CASE WHEN $14 > 0 THEN $15 ELSE last_delivered_at END,"
	" last_failed_at = CASE WHEN $13 > $14 THEN $15 ELSE last_failed_at END"
	" WHERE platform_id = (SELECT x.platform_id FROM redrive.platform_states AS x WHERE x.platform_id = $1"
	"  AND EXISTS (SELECT FROM redrive.platforms AS p WHERE p.platform_id = $1 AND p.config_version = $16) FOR NO KEY UPDATE SKIP LOCKED)",
	16, {INT4OID, TEXTOID, TEXTOID, TIMESTAMPTZOID, TIMESTAMPTZOID, INT4OID, INT4OID, INT4OID, TIMESTAMPTZOID, INT8OID, INT8OID, INT4OID, INT8OID, INT8OID, TIMESTAMPTZOID, INT8OID}
};

static RedriveSql pause_platform = {
	"UPDATE redrive.platforms SET paused = true"
	" WHERE platform_id = (SELECT x.platform_id FROM redrive.platforms AS x WHERE x.platform_id = $1 AND x.config_version = $2 FOR NO KEY UPDATE SKIP LOCKED)",
	2, {INT4OID, INT8OID}
};

static const char *const breaker_names[] = {"closed", "open", "half_open"};

/* Return a number that changes when a platform does. */
int64
redrive_platforms_version(void)
{
	redrive_sql_one_row(&platforms_version, NULL, NULL);
	return redrive_int64(0, "version");
}

static double
float_of(int row, const char *name)
{
	bool		isnull;

	return DatumGetFloat8(redrive_column(row, name, &isnull));
}

/* Return the only struct of an owner, which lives in cxt for good. */
static PushOwner *
owner_of(Oid role, MemoryContext cxt)
{
	static List *owners = NIL;
	MemoryContext old_cxt;
	PushOwner  *owner;
	ListCell   *lc;

	foreach(lc, owners)
		if (((PushOwner *) lfirst(lc))->role == role)
		return lfirst(lc);
	old_cxt = MemoryContextSwitchTo(cxt);
	owner = palloc0(sizeof(PushOwner));
	owner->role = role;
	owners = lappend(owners, owner);
	MemoryContextSwitchTo(old_cxt);
	return owner;
}

/* Have a secret, if there is one, left out of what is kept of answers. */
static void
hide(Platform *p, char *secret)
{
	if (secret != NULL)
		p->hidden = lappend(p->hidden, secret);
}

/*
 * Read one platform from a row of load_platforms, into a context of its own below
 * parent.  What it had before goes at the end: an error leaves something to use.
 */
static void
read_platform(Platform *p, int row, MemoryContext parent)
{
	MemoryContext cxt = AllocSetContextCreate(parent, "redrive platform", ALLOCSET_SMALL_SIZES);
	bool		isnull;
	Datum		headers = redrive_column(row, "headers", &isnull);
	Datum		success_when;
	char	   *bearer = redrive_text(row, "bearer", cxt);
	char	   *basic = redrive_text(row, "basic", cxt);
	Datum	   *values;
	int			n;
	bool		has_type = false;
	MemoryContext old_cxt = MemoryContextSwitchTo(cxt);

	p->name = redrive_text(row, "name", cxt);
	p->gone = false;
	p->has_build = redrive_bool(row, "has_build");
	success_when = redrive_column(row, "success_when", &isnull);
	p->success_when = isnull ? (Datum) 0 : PointerGetDatum(PG_DETOAST_DATUM_COPY(success_when));
	p->method = redrive_text(row, "method", cxt);
	p->url = redrive_text(row, "url", cxt);
	p->allow_http = redrive_bool(row, "allow_http");
	p->timeout_ms = (int) redrive_int64(row, "timeout_ms");
	p->connect_timeout_ms = (int) redrive_int64(row, "connect_timeout_ms");
	p->retry_interval_s = float_of(row, "retry_interval_s");
	p->max_in_flight = DatumGetInt32(redrive_column(row, "max_in_flight", &isnull));
	p->max_retries = DatumGetInt32(redrive_column(row, "max_retries", &isnull));
	p->rate_limit = float_of(row, "rate_limit");
	p->signing[0] = redrive_text(row, "signing", cxt);
	p->signing[1] = redrive_text(row, "signing_previous", cxt);
	p->trouble = redrive_bool(row, "secrets_lost") ? "its secrets are missing" : NULL;

	p->hidden = NIL;
	p->headers = redrive_check_headers(headers, false, OUR_HEADERS);
	for (p->n_headers = 0; p->headers[p->n_headers] != NULL; p->n_headers++)
		if (pg_strncasecmp(p->headers[p->n_headers], "content-type:", 13) == 0)
			has_type = true;
	if (!has_type)
		p->headers[p->n_headers++] = "Content-Type: application/json";
	if (bearer != NULL)
		p->headers[p->n_headers++] = psprintf("Authorization: Bearer %s", bearer);
	else if (basic != NULL)
	{
		const int	length = pg_b64_enc_len(strlen(basic));
		char	   *encoded = palloc0(length + 1);

		if (pg_b64_encode((const void *) basic, strlen(basic), encoded, length) < 0)
			elog(ERROR, "could not encode a secret");
		p->headers[p->n_headers++] = psprintf("Authorization: Basic %s", encoded);
		hide(p, encoded);
	}
	hide(p, bearer);
	hide(p, basic);
	hide(p, p->signing[0]);
	hide(p, p->signing[1]);
	deconstruct_array(DatumGetArrayTypePCopy(redrive_column(row, "allow", &isnull)), TEXTOID, -1, false, TYPALIGN_INT, &values, NULL, &n);
	p->allow = palloc(Max(n, 1) * sizeof(RedriveAddressRange));
	p->n_allow = 0;
	for (int i = 0; i < n; i++)
		if (redrive_parse_range(TextDatumGetCString(values[i]), &p->allow[p->n_allow]))
			p->n_allow++;
	deconstruct_array(DatumGetArrayTypePCopy(redrive_column(row, "permanent_status", &isnull)), INT4OID, sizeof(int32), true, TYPALIGN_INT, &values, NULL, &n);
	p->permanent = palloc(Max(n, 1) * sizeof(int));
	p->n_permanent = n;
	for (int i = 0; i < n; i++)
		p->permanent[i] = DatumGetInt32(values[i]);
	if (p->cxt != NULL)
		MemoryContextDelete(p->cxt);
	p->cxt = cxt;
	p->paused = redrive_bool(row, "paused");
	p->config_version = redrive_int64(row, "config_version");
	MemoryContextSwitchTo(old_cxt);
}

/* Take the breaker from a row: at the start, and after somebody has reset it. */
static void
read_breaker(Platform *p, int row)
{
	char	   *breaker = redrive_text(row, "breaker", CurrentMemoryContext);
	char	   *reason = redrive_text(row, "reason", CurrentMemoryContext);

	p->breaker = strcmp(breaker, "closed") == 0 ? BREAKER_CLOSED : BREAKER_OPEN;
	p->opened_at = redrive_time(row, "opened_at");
	p->blocked_until = redrive_time(row, "blocked_until");
	p->times_opened = (int) redrive_int64(row, "times_opened");
	p->failures_in_row = (int) redrive_int64(row, "failures_in_row");
	p->window_started_at = 0;
	p->window_attempts = 0;
	p->window_failures = 0;
	strlcpy(p->reason, reason != NULL ? reason : "", sizeof(p->reason));
}

/*
 * Return the platforms as they are now, in cxt.
 *
 * What is known of those that have not changed is kept, and the structs of
 * those that are still used by a push are kept too: known is what the last call
 * returned.
 */
List *
redrive_load_platforms(List *known, MemoryContext cxt)
{
	List	   *platforms = NIL;
	ListCell   *lc;
	uint64		rows;

	/* long headers are stored out of line */
	PushActiveSnapshot(GetTransactionSnapshot());
	rows = redrive_sql(&load_platforms, NULL, NULL);
	for (uint64 row = 0; row < rows; row++)
	{
		bool		isnull;
		int32		id = DatumGetInt32(redrive_column(row, "platform_id", &isnull));
		int64		version = redrive_int64(row, "config_version");
		Platform   *p = NULL;
		MemoryContext old_cxt;

		foreach(lc, known)
			if (((Platform *) lfirst(lc))->platform_id == id)
			p = lfirst(lc);
		if (p == NULL)
		{
			p = MemoryContextAllocZero(cxt, sizeof(Platform));
			p->platform_id = id;
			p->owner = owner_of(DatumGetObjectId(redrive_column(row, "owner", &isnull)), cxt);
			p->limit = FIRST_LIMIT;
			p->changed = true;	/* the limit is not what it was */
			dlist_init(&p->claimed);
		}
		if (p->config_version != version || p->paused != redrive_bool(row, "paused"))
		{
			read_platform(p, row, cxt);
			read_breaker(p, row);
		}
		p->limit = Min(p->limit, p->max_in_flight);
		p->more_due = true;
		old_cxt = MemoryContextSwitchTo(cxt);
		platforms = lappend(platforms, p);
		MemoryContextSwitchTo(old_cxt);
	}
	PopActiveSnapshot();
	/* one that was dropped may still have a request under way */
	foreach(lc, known)
	{
		Platform   *p = lfirst(lc);

		if (!list_member_ptr(platforms, p))
		{
			p->paused = true;
			if (!dlist_is_empty(&p->claimed))
			{
				MemoryContext old_cxt = MemoryContextSwitchTo(cxt);

				platforms = lappend(platforms, p);
				MemoryContextSwitchTo(old_cxt);
			}
		}
	}
	return platforms;
}

/* Write down what the breakers have learned. */
void
redrive_write_platforms(List *platforms)
{
	ListCell   *lc;
	TimestampTz now = GetCurrentTimestamp();

	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);
		Datum		values[16];
		Datum		version[2];
		char		nulls[17] = "                ";

		p->written = false;
		if (!p->changed)
			continue;
		values[0] = Int32GetDatum(p->platform_id);
		values[1] = CStringGetTextDatum(breaker_names[p->breaker]);
		values[2] = CStringGetTextDatum(p->reason);
		nulls[2] = p->reason[0] != '\0' ? ' ' : 'n';
		values[3] = TimestampTzGetDatum(p->opened_at);
		nulls[3] = p->opened_at != 0 ? ' ' : 'n';
		values[4] = TimestampTzGetDatum(p->blocked_until);
		nulls[4] = p->blocked_until != 0 ? ' ' : 'n';
		values[5] = Int32GetDatum(p->times_opened);
		values[6] = Int32GetDatum(p->failures_in_row);
		values[7] = Int32GetDatum(p->successes_in_row);
		values[8] = TimestampTzGetDatum(p->window_started_at);
		nulls[8] = p->window_started_at != 0 ? ' ' : 'n';
		values[9] = Int64GetDatum(p->window_attempts);
		values[10] = Int64GetDatum(p->window_failures);
		values[11] = Int32GetDatum(p->limit);
		values[12] = Int64GetDatum(p->new_attempts);
		values[13] = Int64GetDatum(p->new_delivered);
		values[14] = TimestampTzGetDatum(now);
		values[15] = Int64GetDatum(p->config_version);
		version[0] = values[0];
		version[1] = values[15];
		/* later what somebody else has locked, and not what was altered */
		p->written = !p->gone || p->paused || redrive_sql(&pause_platform, version, NULL) > 0;
		if (p->written)
			p->written = redrive_sql(&write_platform, values, nulls) > 0;
	}
}

/* What was written down is committed. */
void
redrive_platforms_are_written(List *platforms)
{
	ListCell   *lc;

	foreach(lc, platforms)
	{
		Platform   *p = lfirst(lc);

		if (!p->written)
			continue;
		p->changed = false;
		p->new_attempts = 0;
		p->new_delivered = 0;
	}
}
