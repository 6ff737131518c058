/*-------------------------------------------------------------------------
 *
 * platform.c
 *	  Platforms and tasks: what SQL cannot do about them.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <math.h>

#include "catalog/pg_type.h"
#include "commands/trigger.h"
#include "miscadmin.h"
#include "pgstat.h"
#include "tcop/tcopprot.h"
#include "utils/builtins.h"
#include "utils/lsyscache.h"
#include "utils/rel.h"
#include "utils/timestamp.h"

#include "base/backoff.h"
#include "base/spi_call.h"
#include "base/xact.h"
#include "flow/handler.h"

#define BUILD_ARG 7

/* of the trigger of a source of tasks */
#define TEST_ARG 2

PG_FUNCTION_INFO_V1(redrive_create_platform);
PG_FUNCTION_INFO_V1(redrive_alter_platform);
PG_FUNCTION_INFO_V1(redrive_set_platform_secret);
PG_FUNCTION_INFO_V1(redrive__retry_delay);
PG_FUNCTION_INFO_V1(redrive__task_source);

/* create_platform and alter_platform: what has to be asked before. */
static Datum
put_platform(FunctionCallInfo fcinfo, bool create)
{
	if (create)
		redrive_check_owner_can_login("a platform");
	if (!PG_ARGISNULL(BUILD_ARG))
		fcinfo->args[BUILD_ARG].value = redrive_callback_name(PG_GETARG_DATUM(BUILD_ARG), CALLBACK_BUILD);
	return redrive_as_owner(fcinfo);
}

Datum
redrive_create_platform(PG_FUNCTION_ARGS)
{
	return put_platform(fcinfo, true);
}

Datum
redrive_alter_platform(PG_FUNCTION_ARGS)
{
	return put_platform(fcinfo, false);
}

/*
 * SQL: set_platform_secret(name, kind, secret)
 *
 * Before anything else the statement, which may have the secret in it, is taken
 * out of where others could read it: pg_stat_activity, and the log if there is
 * an error.  Callers in PL/pgSQL and the like would add it as the context of
 * each message, so they are not asked.
 */
Datum
redrive_set_platform_secret(PG_FUNCTION_ARGS)
{
	ErrorContextCallback *callers = error_context_stack;
	Datum		result;

	debug_query_string = "SELECT redrive.set_platform_secret(...)";
	pgstat_report_activity(STATE_RUNNING, debug_query_string);
	error_context_stack = NULL;
	result = redrive_as_owner(fcinfo);
	/* after an error, who catches it puts back its own */
	error_context_stack = callers;
	return result;
}

/* An interval as microseconds; a month has 30 days. */
static int64
interval_us(Interval *interval)
{
	return interval->time + (interval->day + interval->month * (int64) DAYS_PER_MONTH) * USECS_PER_DAY;
}

/* SQL: _retry_delay(base, factor, most, n, seed) */
Datum
redrive__retry_delay(PG_FUNCTION_ARGS)
{
	int64		base = interval_us(PG_GETARG_INTERVAL_P(0));
	int64		most = interval_us(PG_GETARG_INTERVAL_P(2));
	double		factor = PG_GETARG_FLOAT8(1);
	int			n = PG_GETARG_INT32(3);
	Interval   *result = palloc0(sizeof(Interval));

	/* 0 times a power that overflowed is no number */
	if (base > 0)
	{
		int64		delay = redrive_backoff(base, factor, most, n, (uint64) PG_GETARG_INT64(4));
		int64		full = (int64) Min((double) most, base * pow(factor, n));

		/* the jitter only shortens, here it shall lengthen */
		result->time = full + (full - delay);
	}
	PG_RETURN_INTERVAL_P(result);
}

static RedriveSql record_tasks = {
	"SELECT redrive._record_tasks($1, $2, $3, $4, $5, $6)",
	6, {OIDOID, TEXTARRAYOID, TEXTARRAYOID, JSONBARRAYOID, TEXTARRAYOID, BOOLARRAYOID}
};

/*
 * Check that a source of tasks still has the columns that it was attached with:
 * names, in the order of the arguments of its trigger.
 */
static void
check_source_columns(Relation source, char **names, int n)
{
	static const char *const roles[] = {"key", "status", "test mark"};
	char	   *table = quote_qualified_identifier(get_namespace_name(RelationGetNamespace(source)), RelationGetRelationName(source));

	for (int i = 0; i < n; i++)
	{
		AttrNumber	column = get_attnum(RelationGetRelid(source), names[i]);
		const bool	is_test = i == TEST_ARG;

		if (is_test && names[i][0] == '\0')
			continue;
		if (column == InvalidAttrNumber)
			ereport(ERROR,
					(errcode(ERRCODE_UNDEFINED_COLUMN),
					 errmsg("column \"%s\" of %s does not exist", names[i], table),
					 errdetail("The table is a source of tasks, and takes the %s of each task from this column.", i < lengthof(roles) ? roles[i] : "payload"),
					 errhint("Run redrive.detach_task_source(%s), and redrive.attach_task_source() with the columns that it has now.", quote_literal_cstr(table))));
		if (is_test && get_atttype(RelationGetRelid(source), column) != BOOLOID)
			ereport(ERROR,
					(errcode(ERRCODE_DATATYPE_MISMATCH),
					 errmsg("column \"%s\" of %s is not boolean", names[i], table),
					 errdetail("The table is a source of tasks, and the column says which are tests."),
					 errhint("Run redrive.detach_task_source(%s), and redrive.attach_task_source() with another column.", quote_literal_cstr(table))));
	}
}

/*
 * SQL: trigger _task_source(key, status, test, payload...)
 *
 * Reads the rows with the rights of who changed them, and records tasks of the
 * table's owner.
 */
Datum
redrive__task_source(PG_FUNCTION_ARGS)
{
	TriggerData *data = (TriggerData *) fcinfo->context;
	StringInfoData text;
	char	  **args;
	int			nargs;
	RedriveQuery *query;
	Oid			types[5] = {TEXTARRAYOID, TEXTARRAYOID, JSONBARRAYOID, TEXTARRAYOID, BOOLARRAYOID};
	bool		isnull;
	Datum		values[6];

	if (!CALLED_AS_TRIGGER(fcinfo) || !TRIGGER_FIRED_FOR_STATEMENT(data->tg_event) || data->tg_newtable == NULL || data->tg_trigger->tgnargs < 3)
		ereport(ERROR,
				(errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED),
				 errmsg("function \"_task_source\" was not called by a trigger of redrive.attach_task_source()"),
				 errhint("Use redrive.attach_task_source().")));
	args = data->tg_trigger->tgargs;
	nargs = data->tg_trigger->tgnargs;
	check_source_columns(data->tg_relation, args, nargs);

	/* of several rows with one key the last one counts */
	initStringInfo(&text);
	appendStringInfo(&text,
					 "SELECT pg_catalog.array_agg(t.key), pg_catalog.array_agg(t.status), pg_catalog.array_agg(t.payload), pg_catalog.array_agg(NULL::pg_catalog.text), pg_catalog.array_agg(t.test)"
					 " FROM (SELECT DISTINCT ON (s.key) s.key, s.status, s.payload, s.test FROM"
					 " (SELECT pg_catalog.row_number() OVER () AS n, (r.%s)::pg_catalog.text AS key, (r.%s)::pg_catalog.text AS status, ",
					 quote_identifier(args[0]), quote_identifier(args[1]));
	if (nargs == 3)
		appendStringInfoString(&text, "pg_catalog.to_jsonb(r.*)");
	else
	{
		appendStringInfoString(&text, "pg_catalog.jsonb_build_object(");
		for (int i = 3; i < nargs; i++)
			appendStringInfo(&text, "%s%s, r.%s", i > 3 ? ", " : "", quote_literal_cstr(args[i]), quote_identifier(args[i]));
		appendStringInfoChar(&text, ')');
	}
	appendStringInfoString(&text, " AS payload, ");
	if (args[TEST_ARG][0] != '\0')
		appendStringInfo(&text, "coalesce(r.%s, false)", quote_identifier(args[TEST_ARG]));
	else
		appendStringInfoString(&text, "false");
	appendStringInfoString(&text, " AS test FROM redrive_rows AS r) AS s WHERE s.key OPERATOR(pg_catalog.<>) '' AND s.status IS NOT NULL ORDER BY s.key, s.n DESC) AS t");

	redrive_connect();
	redrive_trigger_rows(data);
	query = redrive_query_open(text.data, lengthof(types), types, "the columns of a task source");
	if (redrive_query_fetch(query, 1) == 1)
	{
		values[0] = ObjectIdGetDatum(data->tg_relation->rd_rel->relowner);
		for (int i = 0; i < lengthof(types); i++)
			values[i + 1] = redrive_query_column(query, 0, i + 1, &isnull);
		if (!isnull)
			(void) redrive_sql(&record_tasks, values, NULL);
	}
	redrive_query_close(query);
	redrive_disconnect();
	return PointerGetDatum(NULL);	/* which is not SQL's NULL */
}
