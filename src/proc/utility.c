/*-------------------------------------------------------------------------
 *
 * utility.c
 *	  Commands that need a database to themselves, and COMMIT PREPARED, which
 *	  wakes whom the transaction would have woken.
 *
 * DROP DATABASE, CREATE DATABASE ... TEMPLATE, and ALTER DATABASE that renames
 * or moves one are refused while anybody is connected, and DROP EXTENSION locks
 * our tables one by one.  Our workers leave the database before such a command of
 * its owner runs; the launcher starts them again when its transaction has ended.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "catalog/namespace.h"
#include "commands/dbcommands.h"
#include "commands/defrem.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "storage/latch.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/timestamp.h"

#include "base/compat.h"
#include "base/guc.h"
#include "base/shmem.h"
#include "base/spi_call.h"
#include "base/wake.h"
#include "flow/deferred.h"
#include "proc/utility.h"

/* How long we wait for the workers to go. */
#define LEAVE_ATTEMPTS 500
#define LEAVE_NAP_MS 10

static ProcessUtility_hook_type previous_utility_hook = NULL;
static bool callback_registered = false;
static bool is_waited_for = false;	/* the launcher has to do at its end */

/* Return the name of the database that the command needs for itself, or NULL. */
static const char *
database_of(Node *stmt)
{
	ListCell   *lc;

	switch (nodeTag(stmt))
	{
		case T_DropdbStmt:
			return ((DropdbStmt *) stmt)->dbname;
		case T_RenameStmt:
			return ((RenameStmt *) stmt)->renameType == OBJECT_DATABASE ? ((RenameStmt *) stmt)->subname : NULL;
		case T_AlterDatabaseStmt:
			foreach(lc, ((AlterDatabaseStmt *) stmt)->options)
				if (strcmp(((DefElem *) lfirst(lc))->defname, "tablespace") == 0)
				return ((AlterDatabaseStmt *) stmt)->dbname;
			return NULL;
		case T_CreatedbStmt:
			foreach(lc, ((CreatedbStmt *) stmt)->options)
				if (strcmp(((DefElem *) lfirst(lc))->defname, "template") == 0 && ((DefElem *) lfirst(lc))->arg)
				return defGetString((DefElem *) lfirst(lc));
			return NULL;
		default:
			return NULL;
	}
}

/*
 * Send our workers of a database away, and keep them away until the transaction
 * ends; returns whether any is left.  To be called again, as one may just be
 * starting.
 */
static bool
dismiss_workers(Oid database)
{
	bool		any = false;
	RedriveDatabase *entry;

	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	entry = redrive_find_database(database);
	if (entry != NULL)
	{
		entry->kept_by = MyProcPid;
		if (entry->pid != 0)
		{
			any = true;
			kill(entry->pid, SIGTERM);
		}
		if (entry->pusher_pid != 0)
		{
			any = true;
			kill(entry->pusher_pid, SIGTERM);
		}
	}
	for (int i = 0; i < REDRIVE_MAX_SLOTS; i++)
	{
		RedriveSlot *slot = &redrive_shared->slots[i];

		if (slot->state == SLOT_FREE || slot->foreground || slot->database != database)
			continue;
		any = true;
		slot->leave = true;
		if (slot->pid != 0)
			kill(slot->pid, SIGTERM);
	}
	LWLockRelease(redrive_shared->lock);
	return any;
}

/* At the end of the transaction: workers may come back, to what there is now. */
static void
at_xact_end(XactEvent event, void *arg)
{
	if (!is_waited_for || (event != XACT_EVENT_COMMIT && event != XACT_EVENT_ABORT && event != XACT_EVENT_PREPARE))
		return;
	is_waited_for = false;
	LWLockAcquire(redrive_shared->lock, LW_EXCLUSIVE);
	for (int i = 0; i < redrive_max_databases; i++)
	{
		RedriveDatabase *entry = &redrive_shared->databases[i];

		if (entry->kept_by != MyProcPid)
			continue;
		entry->kept_by = 0;
		entry->retry_at = 0;
		entry->errors = 0;
	}
	/* it also looks for databases that have been made */
	if (redrive_shared->launcher_latch != NULL)
		SetLatch(redrive_shared->launcher_latch);
	LWLockRelease(redrive_shared->lock);
}

static void
act_at_xact_end(void)
{
	if (!callback_registered)
		RegisterXactCallback(at_xact_end, NULL);
	callback_registered = true;
	is_waited_for = true;
}

/* Does the command drop or update our extension, and may the caller do that? */
static bool
changes_extension(Node *stmt)
{
	ListCell   *lc;
	bool		ours = false;

	if (IsA(stmt, AlterExtensionStmt))
		ours = strcmp(((AlterExtensionStmt *) stmt)->extname, "pg_redrive") == 0;
	else if (IsA(stmt, DropStmt) && ((DropStmt *) stmt)->removeType == OBJECT_EXTENSION)
	{
		foreach(lc, ((DropStmt *) stmt)->objects)
			if (strcmp(strVal(lfirst(lc)), "pg_redrive") == 0)
			ours = true;
	}
	return ours && OidIsValid(get_namespace_oid("redrive", true)) &&
		has_privs_of_role(GetUserId(), redrive_owner());
}

/* Make room before the command; the server itself judges whether it may run. */
static void
make_room(Node *stmt)
{
	const char *name = database_of(stmt);
	Oid			database = name != NULL ? get_database_oid(name, true) : InvalidOid;

	if (IsA(stmt, CreatedbStmt))
		act_at_xact_end();		/* its template may have the extension */
	if (changes_extension(stmt))
		database = MyDatabaseId;
	else if (!OidIsValid(database) || database == MyDatabaseId || !redrive_owns_database(database, GetUserId()))
		return;
	act_at_xact_end();
	for (int i = 0; i < LEAVE_ATTEMPTS && dismiss_workers(database); i++)
	{
		CHECK_FOR_INTERRUPTS();
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 LEAVE_NAP_MS, redrive_wait_event("RedriveDismiss"));
		ResetLatch(MyLatch);
	}
}

static bool
is_commit_prepared(Node *stmt)
{
	return IsA(stmt, TransactionStmt) && ((TransactionStmt *) stmt)->kind == TRANS_STMT_COMMIT_PREPARED;
}

static void
process_utility(PlannedStmt *pstmt, const char *query, bool read_only_tree,
				ProcessUtilityContext context, ParamListInfo params,
				QueryEnvironment *env, DestReceiver *dest, QueryCompletion *qc)
{
	const bool	wakes = is_commit_prepared(pstmt->utilityStmt);

	redrive_check_user_command(pstmt->utilityStmt);
	if (context != PROCESS_UTILITY_SUBCOMMAND && redrive_shared != NULL)
		make_room(pstmt->utilityStmt);
	if (previous_utility_hook)
		previous_utility_hook(pstmt, query, read_only_tree, context, params, env, dest, qc);
	else
		standard_ProcessUtility(pstmt, query, read_only_tree, context, params, env, dest, qc);
	if (wakes && redrive_shared != NULL)
		redrive_wake_prepared();
}

/* Install the hook. */
void
redrive_install_utility_hook(void)
{
	previous_utility_hook = ProcessUtility_hook;
	ProcessUtility_hook = process_utility;
}
