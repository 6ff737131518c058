/*-------------------------------------------------------------------------
 *
 * deferred.c
 *	  Deferred constraints of users, fired before a segment ends.
 *
 * SET CONSTRAINTS ALL IMMEDIATE lasts to the end of the transaction, so the
 * constraints that are initially deferred are deferred again by name: the next
 * item finds them as it would in a transaction of its own.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "catalog/pg_authid.h"
#include "commands/trigger.h"
#include "miscadmin.h"
#include "nodes/makefuncs.h"
#include "utils/inval.h"
#include "utils/memutils.h"
#include "utils/syscache.h"

#include "base/spi_call.h"
#include "flow/deferred.h"
#include "flow/segment.h"

static RedriveSql deferred_constraints = {
	"SELECT n.nspname::text AS schema, c.conname::text AS name,"
	" bool_or(NOT c.condeferrable) AS ambiguous"
	" FROM pg_catalog.pg_constraint AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.connamespace"
	" WHERE (n.nspname !~ '^pg_temp_' OR n.oid = pg_catalog.pg_my_temp_schema())"
	" AND (c.connamespace, c.conname) IN (SELECT d.connamespace, d.conname FROM pg_catalog.pg_constraint AS d WHERE d.condeferred)"
	" GROUP BY n.nspname, c.conname",
	0, {0}
};

/* Constraints that are initially deferred, as far as is known. */
static bool deferred_known = false;
static MemoryContext deferred_cxt = NULL;
static List *deferred = NIL;	/* of RangeVar */
static bool cannot_restore = false; /* names are ambiguous: commit after each
									 * segment */

/* Invalidation: a constraint of this database was made, changed or dropped. */
static void
forget_deferred(Datum arg, int cacheid, uint32 hashvalue)
{
	deferred_known = false;
}

/*
 * Know which constraints are initially deferred in this database.
 *
 * The list lives as long as the process, until a constraint changes.
 */
void
redrive_load_deferred(void)
{
	static bool registered = false;
	MemoryContext old_cxt;
	uint64		rows;

	if (!registered)
	{
		CacheRegisterSyscacheCallback(CONSTROID, forget_deferred, (Datum) 0);
		deferred_cxt = AllocSetContextCreate(TopMemoryContext, "redrive constraints", ALLOCSET_SMALL_SIZES);
		registered = true;
	}
	while (!deferred_known)
	{
		deferred_known = true;	/* unless it changes while we look */
		rows = redrive_sql(&deferred_constraints, NULL, NULL);
		MemoryContextReset(deferred_cxt);
		deferred = NIL;
		cannot_restore = false;
		old_cxt = MemoryContextSwitchTo(deferred_cxt);
		for (uint64 row = 0; row < rows; row++)
		{
			if (redrive_bool(row, "ambiguous"))
				cannot_restore = true;
			else
				deferred = lappend(deferred,
								   makeRangeVar(redrive_text(row, "schema", deferred_cxt),
												redrive_text(row, "name", deferred_cxt), -1));
		}
		MemoryContextSwitchTo(old_cxt);
	}
}

/*
 * Must the interval end with the segment?  True when deferral by default could
 * not be restored after deferred constraints were fired.
 */
bool
redrive_commit_after_segment(void)
{
	return cannot_restore;
}

/*
 * Fire deferred triggers now, as the role of the items, and defer again what
 * is deferred by default.
 *
 * The latter fires nothing, and is done with the rights of a superuser: neither
 * the owner of the handler nor that of the extension need have rights on all
 * schemas that have such a constraint.
 */
void
redrive_fire_deferred(void)
{
	ConstraintsSetStmt *stmt = makeNode(ConstraintsSetStmt);
	UserCode	save;
	Oid			save_user;
	int			save_context;

	redrive_enter_user_code(&save);
	GetUserIdAndSecContext(&save_user, &save_context);
	SetUserIdAndSecContext(save_user, save_context | DEFERRED_CONTEXT);
	AfterTriggerSetState(stmt);
	redrive_leave_user_code(&save);

	/* one may have been dropped while the items ran */
	AcceptInvalidationMessages();
	redrive_load_deferred();
	if (deferred == NIL)
		return;
	stmt->constraints = deferred;
	stmt->deferred = true;
	GetUserIdAndSecContext(&save_user, &save_context);
	SetUserIdAndSecContext(BOOTSTRAP_SUPERUSERID, save_context | SECURITY_LOCAL_USERID_CHANGE);
	AfterTriggerSetState(stmt);
	SetUserIdAndSecContext(save_user, save_context);
}

/*
 * Refuse what would make code of users run in our commit, where nothing keeps it
 * from changing the role, and the books of the interval are locked.
 */
void
redrive_check_user_command(Node *command)
{
	Oid			user;
	int			context;

	GetUserIdAndSecContext(&user, &context);
	if ((context & USER_CODE_CONTEXT) && IsA(command, DeclareCursorStmt) &&
		(castNode(DeclareCursorStmt, command)->options & CURSOR_OPT_HOLD))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("a handler cannot declare a cursor WITH HOLD"),
				 errdetail("It would outlive the item, and its query would be run by the commit."),
				 errhint("Leave WITH HOLD out, or keep the rows in a temporary table.")));
	if ((context & DEFERRED_CONTEXT) && IsA(command, ConstraintsSetStmt) &&
		castNode(ConstraintsSetStmt, command)->deferred)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("a deferred trigger of a handler cannot defer constraints"),
				 errdetail("They would be checked by the commit, when the item that is to blame is not known any more."),
				 errhint("Use SET CONSTRAINTS ... DEFERRED in the handler itself.")));
}
