/*-------------------------------------------------------------------------
 *
 * task_body.c
 *	  The body of a push to a platform without a build function.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_type.h"
#include "fmgr.h"
#include "lib/stringinfo.h"
#include "utils/builtins.h"
#include "utils/datetime.h"
#include "utils/json.h"
#include "utils/jsonb.h"
#include "utils/timestamp.h"

#include "base/http.h"

PG_FUNCTION_INFO_V1(redrive__task_body);

static void
append_time(StringInfo body, Datum time)
{
	char		text[MAXDATELEN + 1];

	(void) JsonEncodeDateTime(text, time, TIMESTAMPTZOID, NULL);
	escape_json(body, text);
}

/*
 * SQL: _task_body(task_key, status, version, process, payload, created_at, changed_at)
 *
 * What json_build_object() would make of these, with less than half of the instructions:
 * that one looks the type of each argument up each time.  NULL if it is longer than a body may be.
 */
Datum
redrive__task_body(PG_FUNCTION_ARGS)
{
	Jsonb	   *payload = PG_GETARG_JSONB_P(4);
	StringInfoData body;

	initStringInfo(&body);
	appendStringInfoString(&body, "{\"task_key\" : ");
	escape_json(&body, text_to_cstring(PG_GETARG_TEXT_PP(0)));
	appendStringInfoString(&body, ", \"status\" : ");
	escape_json(&body, text_to_cstring(PG_GETARG_TEXT_PP(1)));
	appendStringInfo(&body, ", \"version\" : " INT64_FORMAT ", \"process\" : ", PG_GETARG_INT64(2));
	if (PG_ARGISNULL(3))
		appendStringInfoString(&body, "null");
	else
		escape_json(&body, text_to_cstring(PG_GETARG_TEXT_PP(3)));
	appendStringInfoString(&body, ", \"payload\" : ");
	(void) JsonbToCString(&body, &payload->root, VARSIZE(payload));
	appendStringInfoString(&body, ", \"created_at\" : ");
	append_time(&body, PG_GETARG_DATUM(5));
	appendStringInfoString(&body, ", \"changed_at\" : ");
	append_time(&body, PG_GETARG_DATUM(6));
	appendStringInfoChar(&body, '}');
	if (body.len > REDRIVE_HTTP_MAX_BODY)
		PG_RETURN_NULL();
	PG_RETURN_TEXT_P(cstring_to_text_with_len(body.data, body.len));
}
